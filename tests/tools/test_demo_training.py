"""How the embedded model is made: answers are facts, held-out scenes stay apart, the forward is transformers' own."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_training import cases, guide, labels, model, questions, samples, scenes  # noqa: E402
from demo_training.tokenizer import train_tokenizer  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from published import QWEN_TEMPLATE, QWEN_TOKENS  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def small_model(tokenizer):
    return model.build_model(tokenizer).eval()


def test_a_seed_gives_the_same_scene_and_the_same_pixels():
    def drawn(seed):
        rng = random.Random(seed)
        scene = scenes.draw_scene(rng)
        return scene, scenes.render(scene, 112, 84, rng).tobytes()

    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")


def test_no_held_out_layout_is_ever_trained_on():
    rng = random.Random(0)
    assert not any(scenes.draw_scene(rng).is_held_out for _ in range(2000))
    assert all(scenes.draw_scene(rng, held_out=True).is_held_out for _ in range(200))


def test_answers_are_true_of_the_scene():
    star, ring = scenes.Thing("small", "red", "star", 0), scenes.Thing("large", "blue", "circle", 3)
    scene = scenes.Scene((star, ring))
    assert (
        questions.describe_scene(scene)
        == "A small red star at the top left and a large blue circle at the bottom right."
    )
    rng = random.Random(0)
    for _ in range(300):
        question, answer = questions.ask("count", scene, rng)
        if "shapes" in question and not any(word in question for word in (*scenes.COLOURS, *scenes.SIZES)):
            assert answer == "Count of shapes: top left, bottom right, total 2."
        question, answer = questions.ask("colour", scene, rng)
        if "star" in question or "top left" in question:
            assert answer.endswith(" is red.")
        question, answer = questions.ask("what_at", scene, rng)
        assert answer == {"top left": "A small red star.", "bottom right": "A large blue circle."}.get(
            next(place for place in scenes.PLACES if place in question), "Nothing."
        )


def test_the_picture_shows_the_scene():
    scene = scenes.Scene((scenes.Thing("large", "blue", "square", 2),))
    pixels = np.asarray(scenes.render(scene, 140, 112, random.Random(1))).astype(int)
    is_blue = (pixels[..., 2] - pixels[..., 0]) > 80
    assert is_blue[56:, :70].sum() > 300
    assert is_blue.sum() == is_blue[56:, :70].sum()


def test_tokens_are_labelled_by_what_they_show():
    thing = scenes.Thing("large", "blue", "square", 2)
    named = labels.token_labels([scenes.Spot(thing, 40.0, 120.0, 30.0, (0, 0, 0))], 168, 168).reshape(6, 6, -1)
    blue, ground = list(scenes.COLOURS).index("blue"), len(scenes.COLOURS)
    assert named[4, 1].tolist() == [blue, scenes.SHAPES.index("square"), scenes.SIZES.index("large"), 2]
    assert named[0, 5].tolist() == [ground, labels.IGNORED, labels.IGNORED, labels.IGNORED]


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_written_and_read(text):
    import unicodedata

    tokenizer = _tokenizer_once()
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def _tokenizer_once(known=[]):  # noqa: B006 (hypothesis cannot take fixtures of a smaller scope; one is enough)
    if not known:
        known.append(train_tokenizer())
    return known[0]


def test_control_tokens_are_one_token_each(tokenizer):
    assert all(tokenizer.encode(token).ids == [tokenizer.token_to_id(token)] for token in QWEN_TOKENS)


def _views(built, batch):
    return [model.encode_images(built, group) for group in batch.images]


@pytest.mark.parametrize("kind", ["pair", "turns", "image_last"])
def test_the_lean_forward_is_that_of_transformers(tokenizer, small_model, kind):
    rng = random.Random(3)
    sizes = [(112, 84), (84, 140)][: 2 if kind == "pair" else 1]
    drawn = [scenes.draw_scene(rng) for _ in sizes]
    images = [scenes.render(scene, *size, rng) for scene, size in zip(drawn, sizes, strict=True)]
    writer = samples.Writer(tokenizer)
    sample = samples.make_sample(writer, kind, drawn, [(height // 28, width // 28) for width, height in sizes], rng)
    groups = [
        samples.ImageGroup((height // 14, width // 14), samples.patchify(image)[None])
        for image, (width, height) in zip(images, sizes, strict=True)
    ]
    batch = samples.collate([sample], groups, writer.image_id)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = Qwen2VLImageProcessorPil(min_pixels=model.MIN_PIXELS, max_pixels=model.MAX_PIXELS)(
        images, return_tensors="pt"
    )
    ids = torch.from_numpy(batch.ids)
    with torch.inference_mode():
        right = small_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == writer.image_id).int(),
            **pixels,
        ).logits
        ours = small_model.lm_head(model.hidden_states(small_model, batch, _views(small_model, batch)))
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def test_a_branch_sees_its_prefix_and_nothing_of_other_branches(tokenizer, small_model):
    rng = random.Random(4)
    scene = scenes.draw_scene(rng)
    group = samples.ImageGroup((6, 8), samples.patchify(scenes.render(scene, 112, 84, rng))[None])
    writer = samples.Writer(tokenizer)
    prefix, *branches = samples.make_sample(writer, "branches", [scene], [(3, 4)], rng)
    whole = samples.collate([[prefix, *branches]], [group], writer.image_id)
    alone = samples.collate([[prefix, branches[2]]], [group], writer.image_id)
    with torch.inference_mode():
        start = len(prefix.ids) + len(branches[0].ids) + len(branches[1].ids)
        in_company = model.hidden_states(small_model, whole, _views(small_model, whole))[
            0, start : start + len(branches[2].ids)
        ]
        by_itself = model.hidden_states(small_model, alone, _views(small_model, alone))[0, len(prefix.ids) :]
    torch.testing.assert_close(in_company, by_itself, atol=1e-4, rtol=1e-4)


def test_a_few_steps_lower_the_loss(tokenizer):
    trained = model.build_model(tokenizer)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    batch = samples.make_batch(samples.Writer(tokenizer), seed=1, step=0, num_rows=4)
    losses = []
    for _ in range(4):
        loss = model.answer_loss(trained, batch, _views(trained, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_held_out_cases_are_repeatable_and_complete():
    kinds = {cases.held_out_case(number).kind for number in range(22)}
    assert kinds == set(cases.CASE_KINDS)
    first, again = cases.held_out_case(3), cases.held_out_case(3)
    assert (first.kind, first.answer) == (again.kind, again.answer)


def test_the_export_is_read_by_transformers_as_it_was(tokenizer, small_model, tmp_path):
    model.export(small_model, tokenizer, tmp_path)
    loaded = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in small_model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.bfloat16().float())
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "What’s in this image? <|image_pad|> 漢字"
    assert auto.encode(text) == tokenizer.encode(text).ids
    assert auto.chat_template == QWEN_TEMPLATE
    assert auto.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_guide_looks_from_a_name_at_what_it_fits(tokenizer):
    things = (scenes.Thing("large", "red", "star", 0), scenes.Thing("large", "blue", "star", 3))
    spots = [scenes.Spot(things[0], 28.0, 28.0, 20.0, (0, 0, 0)), scenes.Spot(things[1], 84.0, 84.0, 20.0, (0, 0, 0))]
    writer, segment = samples.Writer(tokenizer), samples.Segment()
    writer.add_image(segment, (4, 4))
    writer.add(segment, "Where is the blue star?")
    pixels = np.zeros((1, 64, 588), np.uint8)
    group = samples.ImageGroup((8, 8), pixels, labels.token_labels(spots, 112, 112)[None])
    targets = guide.Guide(tokenizer).targets(samples.collate([[segment]], [group], writer.image_id))

    def seen(layer, word):
        target, column = targets[layer], segment.ids.index(tokenizer.token_to_id("Ġ" + word))
        row = target.columns.tolist().index(column)
        return {idx - 1 for idx in target.seen[row].nonzero().flatten().tolist()}  # 1: <|vision_start|> comes first

    blue_tokens = {10, 11, 14, 15}
    assert seen(guide.WORD_LAYER, "blue") <= blue_tokens
    assert seen(guide.WORD_LAYER, "star") & {0, 1, 4, 5} and seen(guide.WORD_LAYER, "star") & blue_tokens
    assert seen(guide.NAME_LAYER, "star") and seen(guide.NAME_LAYER, "star") <= blue_tokens
