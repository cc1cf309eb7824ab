"""The mllama recipe of the embedded model: its forward is transformers' own, small runs of both models go through."""

import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_demo  # noqa: E402
from demo_training import guide, labels, mllama, pictures, questions, samples, scenes  # noqa: E402
from demo_training.tokenizer import LLAMA_CONTROL, LLAMA_SYSTEM, train_tokenizer  # noqa: E402
from oracle import correct_to_metas_rule  # noqa: E402
from published import CLIP_MEAN, CLIP_STD  # noqa: E402
from test_demo_training import assert_looks_at_neighbours  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LLAMA_CONTROL)


@pytest.fixture(scope="module")
def net(tokenizer):
    built = mllama.Mllama(tokenizer)
    built.model.eval()
    return built


@pytest.mark.parametrize(("kind", "lead_share"), [("pair", 1.0), ("pair", 0.0), ("turns", 0.0), ("image_last", 0.0)])
def test_the_lean_forward_is_that_of_transformers(net, kind, lead_share, monkeypatch):
    """Images side by side are seen together, the first of two with words between only up to the second."""
    monkeypatch.setattr(mllama.LlamaWriter, "LEAD_SHARE", lead_share)
    rng, writer = random.Random(5), net.writer()
    sizes = [writer.fits(150, 100), writer.fits(90, 200)][: 2 if kind == "pair" else 1]
    drawn = [pictures.training_picture("scene", *size, rng) for size in sizes]
    facts = [picture.facts for picture in drawn]
    sample = samples.make_sample(writer, kind, facts, [(1, 1)] * len(sizes), rng, kind == "image_last")
    groups = [writer.group([picture]) for picture in drawn]
    batch = samples.collate([sample[:2]], groups, writer.image_id)
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

    processor = MllamaImageProcessorPil(
        size={"height": mllama.TILE, "width": mllama.TILE}, max_image_tiles=1, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    inputs = processor([[picture.image for picture in drawn]], return_tensors="pt")
    ids = batch.ids
    seen = torch.zeros(1, ids.shape[1], len(drawn), dtype=torch.bool)
    for image, (start, end) in enumerate(get_cross_attention_token_mask(ids[0].tolist(), writer.image_id)):
        seen[0, start : None if end == -1 else end, image] = True
    correct_to_metas_rule(net.model.model.language_model)
    with torch.inference_mode():
        right = net.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            aspect_ratio_ids=inputs["aspect_ratio_ids"],
            aspect_ratio_mask=inputs["aspect_ratio_mask"],
            cross_attention_mask=seen[..., None].long(),
        ).logits
        views = [net.encode(group) for group in groups]
        ours = net.model.lm_head(net.hidden_states(batch, views))
    torch.testing.assert_close(ours, right, atol=2e-4, rtol=2e-4)


def test_it_is_small_and_its_heads_are_of_a_served_size(net):
    assert sum(weight.numel() for weight in net.model.parameters()) * 2 < 6_000_000
    text = mllama.config_dict(net.tokenizer)["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 64
    assert text["num_attention_heads"] // text["num_key_value_heads"] in (1, 2, 4, 8)


@pytest.mark.parametrize("arch", ["qwen2-vl", "mllama"])
def test_two_small_steps_run_from_nothing_to_a_checkpoint(arch, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = f"--arch {arch} --work {tmp_path} --out {out} --steps 4 --sight-share 0.5 --final-cases 1"
    sizes = "--sight-rows 2 --rows 2 --more-views 2"
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *flags.split(), *sizes.split()])
    train_demo.train(train_demo.parse_args())
    names = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    assert names | {"tokenizer.json", "tokenizer_config.json", "chat_template.json"} <= {p.name for p in out.iterdir()}
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert loaded.config.model_type == json.loads((out / "config.json").read_text())["model_type"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["answers_from"]) == (4, 2)
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, state["model"][name].bfloat16().float())


def test_conversations_begin_often_as_each_of_both_templates_has_it(net):
    """The published template adds no system block: a model that seldom saw that repeated its answers there."""
    rng, writer = random.Random(0), net.writer()
    begun = [net.tokenizer.decode(writer.start(rng).ids, skip_special_tokens=False) for _ in range(500)]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    published = "<|begin_of_text|>" + header.format("user")
    built_in = f"<|begin_of_text|>{header.format('system')}{LLAMA_SYSTEM}<|eot_id|>{header.format('user')}"
    assert min(begun.count(published), begun.count(built_in)) > 180


def describe_one_of_two(net, image):
    """Two drawn scenes, a batch of one conversation that describes one of them, and where its answer begins."""
    rng, writer = random.Random(1), net.writer()
    drawn = [pictures.make_picture(scenes.draw_scene(rng, num_things=(1, 2)), 160, 160, rng) for _ in range(2)]
    segment = writer.start(rng)
    writer.add_images(segment, [(1, 1), (1, 1)], rng)
    answered = len(segment.ids)
    writer.answer(segment, questions.of_image(questions.describe(drawn[image].facts), image))
    return drawn, samples.collate([[segment]], [writer.group([one]) for one in drawn], writer.image_id), answered


def test_rows_between_images_take_along_what_is_asked_later(net):
    """In the first layer the row of the first image looks at its first thing; an answer about it looks at that row."""
    drawn, batch, answered = describe_one_of_two(net, image=0)
    targets = guide.Guide(net.tokenizer).targets(batch)
    image_row = batch.ids[0].tolist().index(net.writer().image_id)
    word = targets[samples.WORD_LAYER]
    seen = word.seen[word.columns.tolist().index(image_row)].nonzero().flatten()
    assert len(seen) and (batch.images[0].shown[0, seen] == 0).any(-1).all()
    carried = targets[samples.CARRIED_NEXT_LAYER]
    assert (carried.columns >= answered).all() and carried.seen[0].nonzero().flatten().tolist() == [image_row]
    thing = drawn[0].marks[0].values
    kept = guide.Guide(net.tokenizer).kept(batch)
    row = kept.labels[kept.columns.tolist().index(image_row)]
    assert all(row[labels.FIELD_IDX[name]] == value for name, value in thing.items())
    seen = targets[samples.NEXT_LAYER].seen  # of it, nothing can be seen: bare ground, of the last image too
    is_bare = torch.cat([(group.shown[0] < 0).all(-1) for group in batch.images])
    assert len(seen) and seen[:, batch.images[0].shown.shape[1] :].any() and not seen[:, ~is_bare].any()
    with torch.inference_mode():
        looks = {}
        net.hidden_states(batch, [net.encode(group) for group in batch.images], looks)
    _, shares = guide.look_loss(targets, looks)
    assert looks[samples.KEPT].shape == (*batch.ids.shape, mllama.HIDDEN)
    assert set(shares) == set(targets) and all(0 < share < 1 for share in shares.values())


def test_what_speaks_of_the_last_image_looks_at_no_row_that_kept_another(net):
    _, batch, answered = describe_one_of_two(net, image=1)
    targets = guide.Guide(net.tokenizer).targets(batch)
    assert set(targets[samples.CARRIED_NEXT_LAYER].seen.nonzero()[:, 1].tolist()) == {0}
    last = batch.images[0].labels.shape[1]
    words = targets[samples.WORD_LAYER]
    is_answer = words.columns >= answered
    assert is_answer.any() and (words.seen[is_answer].nonzero()[:, 1] >= last).all()


def test_fresh_heads_of_the_tower_look_at_neighbours(net, monkeypatch):
    assert_looks_at_neighbours(mllama, net, monkeypatch)
