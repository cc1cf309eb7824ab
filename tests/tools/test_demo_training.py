"""How the embedded model is made: answers are facts, what is held out stays apart, the forward is transformers' own."""

import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_training import (  # noqa: E402
    cases,
    charts,
    dialogues,
    guide,
    labels,
    model,
    phrases,
    pictures,
    prints,
    questions,
    qwen2_vl,
    samples,
    scenes,
    views,
)
from demo_training.tokenizer import train_tokenizer  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from published import QWEN_TEMPLATE, QWEN_TOKENS  # noqa: E402

STAR, RING = scenes.Thing("small", "red", "star", 0), scenes.Thing("large", "blue", "ring", 8)
SCENE = scenes.Scene((STAR, RING))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def small_model(tokenizer):
    net = qwen2_vl.Qwen2VL(tokenizer)
    net.model.eval()
    return net


def some_facts(rng, size=(168, 168), held_out=False):
    return pictures.draw_facts(rng.choice(pictures.KINDS), *size, rng, held_out)


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_a_seed_gives_the_same_facts_and_the_same_pixels(kind):
    def drawn(seed):
        rng = random.Random(seed)
        facts = pictures.draw_facts(kind, 150, 100, rng)
        return facts, pictures.make_picture(facts, 150, 100, rng).image.tobytes()

    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")


@pytest.mark.parametrize("kind", ["scene", "print", "chart"])
def test_nothing_held_out_is_ever_trained_on(kind):
    rng = random.Random(0)
    drawn = [[pictures.draw_facts(kind, 168, 168, rng, held_out).key for _ in range(200)] for held_out in (False, True)]
    assert not any(scenes.is_held_out(key) for key in drawn[0])
    assert all(scenes.is_held_out(key) for key in drawn[1])


def test_no_held_out_wording_is_ever_trained_on():
    rng = random.Random(0)
    for kind in phrases.CORES:
        trained, held_out = (set(phrases.wordings(kind, is_held_out)) for is_held_out in (False, True))
        assert held_out and not trained & held_out
        assert {phrases.wording(kind, rng, False) for _ in range(100)} <= trained
        assert {phrases.wording(kind, rng, True) for _ in range(100)} <= held_out
    outside = {phrases.ask_outside(rng, False) for _ in range(300)}
    assert not outside & {phrases.ask_outside(rng, True) for _ in range(300)}


def test_answers_are_true_of_the_scene():
    assert (
        questions.plain(questions.describe(SCENE))
        == "A small red star at the top left and a large blue ring at the bottom right."
    )
    rng = random.Random(0)
    for _ in range(200):
        question, answer = (questions.plain(said) for said in questions.ask("count", SCENE, rng))
        if "shapes" in question and not any(word in question for word in (*scenes.COLOURS, *scenes.SIZES)):
            assert answer == "Number of shapes: top left, bottom right, so 2."
        question, answer = (questions.plain(said) for said in questions.ask("colour", SCENE, rng))
        if "star" in question or "top left" in question:
            assert answer.endswith(" is red.")
        question, answer = (questions.plain(said) for said in questions.ask("exists", SCENE, rng))
        if "blue star" in question or "circle" in question:
            assert answer.endswith(": no.")
        question, answer = (questions.plain(said) for said in questions.ask("relation", SCENE, rng))
        star_first = answer.index("top left") < answer.index("bottom right")
        assert answer.endswith("yes.") == (star_first == ("left of" in question or "above" in question))


def test_answers_are_true_of_prints_and_charts():
    rng, chart = random.Random(1), charts.Chart(("red", "green", "blue"), (2, 5, 3))
    assert questions.plain(questions.describe(prints.Print("STOP", "red"))) == 'It says "STOP".'
    assert (
        questions.plain(questions.describe(chart))
        == "A bar chart with red, green and blue bars. The tallest bar is green."
    )
    for _ in range(100):
        question, answer = (questions.plain(said) for said in questions.ask("tallest", chart, rng))
        assert answer == f"The {'tallest bar is green' if 'tallest' in question else 'shortest bar is red'}."
        question, answer = (questions.plain(said) for said in questions.ask("taller", chart, rng))
        assert answer == f"The {'green' if 'green' in question else 'blue'} bar is taller."


def test_what_is_not_of_its_world_is_declined():
    rng = random.Random(2)
    for _ in range(200):
        assert questions.plain(questions.ask_any(None, rng)[1]) == questions.DECLINE
    assert questions.plain(questions.ask("outside", SCENE, rng)[1]) == questions.DECLINE


def test_several_images_keep_their_order():
    rng, many = random.Random(3), [SCENE, prints.Print("GO", "red")]
    for _ in range(100):
        question, answer = (questions.plain(said) for said in dialogues.ask_many(many, rng, kind="nth_image"))
        assert ("GO" in answer) == ("second" in question)
    assert questions.plain(dialogues.ask_many([SCENE, SCENE], rng, kind="same")[1]).endswith("The images are the same.")
    assert questions.plain(dialogues.ask_many(many, rng, kind="same")[1]).endswith("The images are different.")


def test_the_picture_shows_the_scene():
    scene = scenes.Scene((scenes.Thing("large", "blue", "square", 6),))
    pixels = np.asarray(pictures.make_picture(scene, 150, 120, random.Random(1)).image).astype(int)
    is_blue = (pixels[..., 2] - pixels[..., 0]) > 80
    assert is_blue[60:, :75].sum() > 300
    assert is_blue.sum() == is_blue[60:, :75].sum()


def test_things_never_touch_and_stay_inside():
    rng = random.Random(4)
    for _ in range(200):
        width, height = pictures.pick_size(rng)
        spots = scenes.lay_out(scenes.draw_scene(rng, width, height), width, height, rng)
        assert all(spot.radius < spot.x < width - spot.radius for spot in spots)
        assert all(spot.radius < spot.y < height - spot.radius for spot in spots)
        gaps = [math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius for a, b in itertools.combinations(spots, 2)]
        assert min(gaps, default=9) > 2


def test_the_most_crowded_layout_is_found_at_once():
    rng = random.Random(8)
    scene = scenes.Scene(tuple(scenes.Thing("large", "red", "star", place) for place in (0, 1, 3, 4, 6, 7)))
    for _ in range(20):
        assert len(scenes.lay_out(scene, 58, 56, rng)) == 6


def test_tokens_are_labelled_by_what_they_show():
    values = {"colour": 4, "shape": 1, "size": 2, "place": 6, "order": 0}
    mark = pictures.Mark(10, 90, 70, 150, values)
    picture = pictures.Picture(SCENE, pictures.Image.new("RGB", (160, 160)), (mark,))
    named, shown = labels.token_labels(picture)
    at, side = labels.FIELD_IDX, 160 // pictures.UNIT
    row, column = 120 // pictures.UNIT, 40 // pictures.UNIT  # of the mark's center
    token = named.reshape(side, side, -1)[row, column]
    assert {name: token[at[name]] for name in values} == values
    assert token[at["center"]] == 1 and shown.reshape(side, side, -1)[row, column].tolist() == [0, -1]
    corner = named.reshape(side, side, -1)[0, -1]
    assert corner[at["colour"]] == len(scenes.COLOURS) and corner[at["shape"]] == labels.IGNORED
    assert set(named[:, at["picture"]]) == {pictures.KINDS.index("scene")}


def test_every_glyph_of_a_print_is_labelled_once():
    rng = random.Random(5)
    for _ in range(100):
        picture = pictures.training_picture("print", 192, 128, rng)
        named, shown = labels.token_labels(picture)
        seen = named[:, [labels.FIELD_IDX["glyph"], labels.FIELD_IDX["glyph2"]]]
        glyphs = {int(shown[token, slot]): prints.GLYPHS[seen[token, slot]] for token, slot in np.argwhere(shown >= 0)}
        assert "".join(glyphs[idx] for idx in sorted(glyphs)) == picture.facts.text


def test_the_seen_size_is_that_of_the_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = random.Random(6)
    for width, height in (pictures.pick_size(rng) for _ in range(500)):
        down, across = smart_resize(
            height, width, factor=pictures.UNIT, min_pixels=pictures.MIN_PIXELS, max_pixels=pictures.MAX_PIXELS
        )
        assert pictures.seen_size(width, height) == (across, down)


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


def test_what_is_said_in_parts_has_the_tokens_of_the_whole(tokenizer):
    rng = random.Random(7)
    asked = [questions.ask_any(some_facts(rng), rng) for _ in range(300)]
    asked += [dialogues.ask_many(dialogues.draw_many([(168, 168)] * 2, rng), rng) for _ in range(100)]
    for said in (said for pair in asked for said in pair):
        parts = [part if isinstance(part, str) else part.text for part in said]
        in_parts = [token_id for part in parts for token_id in tokenizer.encode(part).ids]
        assert in_parts == tokenizer.encode("".join(parts)).ids


def _views(built, batch):
    return [built.encode(group) for group in batch.images]


@pytest.mark.parametrize("kind", ["pair", "turns", "image_last"])
def test_the_lean_forward_is_that_of_transformers(tokenizer, small_model, kind):
    rng = random.Random(3)
    sizes = [(160, 144), (144, 176)][: 2 if kind == "pair" else 1]
    drawn = [pictures.training_picture("scene", *size, rng) for size in sizes]
    writer = samples.Writer(tokenizer)
    grids = [writer.num_slots(*size) for size in sizes]
    facts = [picture.facts for picture in drawn]
    sample = samples.make_sample(writer, kind, facts, grids, rng, kind == "image_last")
    batch = samples.collate([sample[:2]], [views.image_group([picture]) for picture in drawn], writer.image_id)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        min_pixels=pictures.MIN_PIXELS, max_pixels=pictures.MAX_PIXELS, patch_size=views.PATCH, merge_size=views.MERGE
    )
    pixels = processor([picture.image for picture in drawn], return_tensors="pt")
    ids = batch.ids
    with torch.inference_mode():
        right = small_model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == writer.image_id).int(),
            **pixels,
        ).logits
        ours = small_model.model.lm_head(small_model.hidden_states(batch, _views(small_model, batch)))
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def test_a_branch_sees_its_prefix_and_nothing_of_other_branches(tokenizer, small_model):
    rng = random.Random(4)
    picture = pictures.training_picture("scene", 160, 144, rng)
    group = views.image_group([picture])
    writer = samples.Writer(tokenizer)
    prefix, *branches = samples.make_sample(writer, "branches", [picture.facts], [(9, 10)], rng)
    whole = samples.collate([[prefix, *branches]], [group], writer.image_id)
    alone = samples.collate([[prefix, branches[2]]], [group], writer.image_id)
    with torch.inference_mode():
        start = len(prefix.ids) + len(branches[0].ids) + len(branches[1].ids)
        in_company = small_model.hidden_states(whole, _views(small_model, whole))[
            0, start : start + len(branches[2].ids)
        ]
        by_itself = small_model.hidden_states(alone, _views(small_model, alone))[0, len(prefix.ids) :]
    torch.testing.assert_close(in_company, by_itself, atol=1e-4, rtol=1e-4)


def test_the_model_is_small_enough(small_model):
    assert sum(weight.numel() for weight in small_model.model.parameters()) * 2 < 6_000_000


def test_a_few_steps_lower_the_loss(tokenizer):
    trained = qwen2_vl.Qwen2VL(tokenizer)
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-3)
    batch = samples.make_batch(samples.Writer(tokenizer), "branches", seed="1", step=0, num_rows=4)
    losses = []
    for _ in range(4):
        loss = model.answer_loss(trained, batch, _views(trained, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_a_question_has_one_right_answer():
    """Of things that are all alike, too, where a place is all that tells one from the other."""
    rng = random.Random(8)
    alike = scenes.Scene(tuple(scenes.Thing("small", "red", "star", place) for place in (0, 5, 7)))
    for facts in (alike, *(some_facts(rng) for _ in range(40))):
        answers = {}
        for kind in list(questions.kinds_of(facts)) * 40:
            question, answer = (questions.plain(said) for said in questions.ask(kind, facts, rng))
            assert answers.setdefault(question, answer) == answer


def test_hard_kinds_are_taught_more_often_than_they_are_asked_of_held_out_cases():
    rng = random.Random(12)
    chart = charts.Chart(("red", "blue", "pink"), (1, 4, 2))

    def share(start, held_out):
        told = [questions.plain(questions.ask_any(chart, rng, held_out)[1]) for _ in range(1000)]
        return sum(answer.startswith(start) for answer in told) / len(told)

    start = "Number of bars"
    assert share(start, held_out=False) > 1.4 * share(start, held_out=True)


def test_fonts_in_whose_place_pillows_own_is_drawn_are_told(monkeypatch):
    monkeypatch.setattr(prints, "_matplotlib_fonts", Path)
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):  # where Pillow looks for fonts of the system
        monkeypatch.setenv(name, "/nowhere")
    prints.load_font.cache_clear()
    assert prints.missing_fonts() == [name for name in prints.FONTS if name]
    monkeypatch.undo()
    prints.load_font.cache_clear()
    found = [name for name in prints.FONTS if name and prints.load_font(name, 20).getname()[0].startswith("DejaVu")]
    assert sorted([*found, *prints.missing_fonts()]) == sorted(name for name in prints.FONTS if name)


def test_no_held_out_word_stands_on_a_page():
    rng = random.Random(4)
    lines = [printed.text for _ in range(300) for printed, _ in prints.lay_out_page(240, 160, rng)]
    held_out = [word for word in prints.WORDS if scenes.is_held_out(word) and len(word) > 3]
    assert held_out and not any(line.startswith(word) for line in lines for word in held_out)
    assert sum(line.startswith(prints.TRAINED_WORDS) for line in lines) > 100


def test_every_glyph_of_a_page_is_named_by_a_token():
    rng = random.Random(2)
    for size in ((160, 160), (240, 112), (96, 272)):
        page = pictures.make_page(*size, rng)
        _, shown = labels.token_labels(page)
        assert len(page.marks) > 4 and set(shown[shown >= 0]) == set(range(len(page.marks)))
        assert all(mark.top >= 0 and mark.bottom <= size[1] and 0 < mark.center[0] < size[0] for mark in page.marks)


@pytest.mark.parametrize("kind", ["scene", "print", "chart"])
def test_what_is_varied_differs_in_one_thing(kind):
    rng = random.Random(5)
    for _ in range(50):
        facts = pictures.draw_facts(kind, 168, 168, rng)
        varied = dialogues.vary(facts, rng)
        ones, others = (facts.text, varied.text) if kind == "print" else (facts.key.split(";"), varied.key.split(";"))
        assert sum(one != other for one, other in zip(ones, others, strict=True)) == 1
        assert not scenes.is_held_out(varied.key)


def test_of_a_conclusion_only_the_last_words_are_learned(tokenizer):
    batch = samples.make_batch(samples.Writer(tokenizer), "conclusion", seed="0", step=0, num_rows=8)
    assert not batch.images and len(batch.ids) == 24
    learned = tokenizer.decode(batch.answer_ids.tolist(), skip_special_tokens=False).split("<|im_end|>")
    assert {"yes" in part or "no." in part or "same" in part or "different" in part for part in learned[:-1]} == {True}
    assert len(learned) == 25 and max(map(len, learned)) < 30


def test_only_a_conclusion_weighs_more_and_not_the_end_of_a_list(tokenizer):
    scene = scenes.Scene(tuple(scenes.Thing("small", "red", "star", place) for place in (0, 5)))
    other = scenes.Scene((scenes.Thing("small", "blue", "ring", 0), scenes.Thing("large", "red", "star", 8)))
    rng = random.Random(0)
    answers = {
        "count": questions.ask("count", scene, rng),
        "describe": questions.ask("describe", scene, rng),
        "which": dialogues.ask_many((scene, other), rng, kind="which_image"),
        "relation": questions.ask("relation", other, rng),
        "same": dialogues.ask_many((scene, scene), rng, kind="same"),
    }
    for kind, (_, answer) in answers.items():
        segment = samples.Segment()
        samples.Writer(tokenizer).answer(segment, answer)
        weights = [weight for weight in segment.learned if weight]
        heavier = samples.CONCLUSION_WEIGHT if kind in ("relation", "same") else 1
        assert max(weights) == pytest.approx(heavier * min(weights)), kind


def test_a_further_turn_asks_for_an_answer_that_only_begins_as_the_one_before(tokenizer, monkeypatch):
    monkeypatch.setattr(samples, "FOLLOW_UP_SHARE", 1)
    colour, size, other = (
        ((f"{text}?",), (f"The {text[:4]} is", f" {text[5:]}", ".")) for text in ("star red", "star big", "ring red")
    )
    asked, branch = iter((colour, other, size, size, other, colour)), samples.Segment()
    samples.add_turns(samples.Writer(tokenizer), branch, colour, lambda: next(asked), random.Random(0))
    told = tokenizer.decode(branch.ids, skip_special_tokens=False)
    answers = [part.split("<|im_end|>")[0] for part in told.split("assistant\n")[1:]]
    assert answers == ["The star is big.", "The star is red."]


def test_a_name_that_things_of_several_images_have_looks_at_all_of_them(tokenizer):
    scene = scenes.Scene((scenes.Thing("small", "red", "star", 0),))
    writer, segment = samples.Writer(tokenizer), samples.Segment()
    writer.add_question(segment, dialogues.ask_many([scene] * 3, random.Random(0), kind="which_image")[0])
    assert [look.shown for look in segment.looks] == [tuple((image, 0) for image in range(3))]


def test_fresh_heads_of_the_tower_look_at_neighbours(small_model, monkeypatch):
    assert_looks_at_neighbours(qwen2_vl, small_model, monkeypatch)


def assert_looks_at_neighbours(module, net, monkeypatch):
    """Patches in the middle look at the one that their head is for, ten times as much as at any other on average."""
    looks, attend = [], module.attend
    monkeypatch.setattr(module, "attend", lambda *args: (looks.append(attend(*args)[1]), attend(*args))[1])
    writer, side = net.writer(), 20
    with torch.inference_mode():
        net.encode(writer.group([pictures.training_picture("scene", 160, 160, random.Random(0))]))
    at = torch.arange(side * side)
    if looks[0].shape[-1] == side * side:  # merged blocks of 2x2 one after the other
        order = at.view(side // 2, side // 2, 2, 2).transpose(1, 2).reshape(side, side)
    else:  # row by row after the class token
        order = at.view(side, side) + 1
    heads = [head for look in looks for head in look[0]]
    for (down, across), head in zip(model.NEIGHBOURS, heads, strict=False):
        inner = range(2, side - 2)
        there = [head[order[y, x], order[y + down, x + across]] for y in inner for x in inner]
        assert float(torch.stack(there).mean()) > 10 / side**2


def test_held_out_cases_are_repeatable_and_complete():
    kinds = {cases.held_out_case(number).kind for number in range(len(cases.CASE_KINDS))}
    assert kinds == set(cases.CASE_KINDS)
    first, again = cases.held_out_case(3), cases.held_out_case(3)
    assert (first.kind, first.answer) == (again.kind, again.answer)


def test_the_export_is_read_by_transformers_as_it_was(tokenizer, small_model, tmp_path):
    small_model.export(tmp_path)
    loaded = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in small_model.model.state_dict().items():
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


def test_the_guide_looks_from_words_at_what_they_speak_of(tokenizer):
    unit = pictures.UNIT
    boxes = ((2, 2, 2 * unit - 2, 2 * unit - 2), (2 * unit + 2, 2 * unit + 2, 4 * unit - 2, 4 * unit - 2))
    things = (scenes.Thing("large", "red", "star", 0), scenes.Thing("large", "blue", "star", 8))
    marks = [
        pictures.Mark(
            *box, {"colour": list(scenes.COLOURS).index(thing.colour), "shape": 3, "size": 2, "place": thing.place_idx}
        )
        for box, thing in zip(boxes, things, strict=True)
    ]
    picture = pictures.Picture(scenes.Scene(things), pictures.Image.new("RGB", (4 * unit, 4 * unit)), tuple(marks))
    writer, segment = samples.Writer(tokenizer), samples.Segment()
    writer.add_image(segment, (4, 4))
    asked = "Where is the {name}? Not the {other}."
    names = {"name": questions.Seen("blue star", (1,)), "other": questions.Seen("red ring", ())}
    writer.add_question(segment, questions.fill(asked, **names))
    writer.answer(segment, ("The blue star is", questions.Seen(" at the bottom right", (1,)), "."))
    batch = samples.collate([[segment]], [views.image_group([picture])], writer.image_id)
    targets = guide.Guide(tokenizer).targets(batch)

    def seen(layer, word):
        target, column = targets[layer], segment.ids.index(tokenizer.token_to_id("Ġ" + word))
        row = target.columns.tolist().index(column)
        return set(target.seen[row].nonzero().flatten().tolist())

    blue_tokens = {10, 11, 14, 15}
    assert seen(guide.WORD_LAYER, "blue") and seen(guide.WORD_LAYER, "blue") <= blue_tokens
    assert seen(guide.WORD_LAYER, "star") & {0, 1, 4, 5} and seen(guide.WORD_LAYER, "star") & blue_tokens
    assert seen(guide.NAME_LAYER, "star") and seen(guide.NAME_LAYER, "star") <= blue_tokens
    assert seen(guide.NEXT_LAYER, "at") and seen(guide.NEXT_LAYER, "at") <= blue_tokens
    bare_tokens = {2, 3, 6, 7, 8, 9, 12, 13}  # where a name fits nothing, and where an answer has said it all
    assert seen(guide.NAME_LAYER, "ring") == seen(guide.NEXT_LAYER, "right") == bare_tokens


def test_two_descriptions_are_compared_word_by_word(tokenizer):
    writer, segment = samples.Writer(tokenizer), samples.Segment()
    scene = scenes.Scene((scenes.Thing("large", "red", "star", 0),))
    other = scenes.Scene((scenes.Thing("large", "blue", "star", 0),))
    question, answer = dialogues.ask_many([scene, other], random.Random(0), kind="same")
    writer.add_images(segment, [(4, 4), (4, 4)], random.Random(0))
    writer.add_question(segment, question)
    writer.answer(segment, answer)
    image = pictures.Picture(scene, pictures.Image.new("RGB", (4 * pictures.UNIT,) * 2), ())
    batch = samples.collate([[segment]], [views.image_group([image])] * 2, writer.image_id)
    target = guide.Guide(tokenizer).targets(batch)[samples.COMPARED_LAYER]
    words = {
        tokenizer.decode([segment.ids[column]]): tokenizer.decode([segment.ids[int(at)] for at in seen.nonzero()])
        for column, seen in zip(target.columns.tolist(), target.seen, strict=True)
    }
    assert words[" Second"] == "First" and words[" blue"] == " red" and words[" star"] == " star"
    matched = guide.Guide(tokenizer).matched(batch)
    differing = [segment.ids[column] for column in matched.columns[matched.differs == 1].tolist()]
    assert tokenizer.decode(differing) == " blue"  # not the heading, which always differs
    assert len(matched.rows) > 5


def test_two_given_texts_are_compared_without_images(tokenizer):
    batch = samples.make_batch(samples.Writer(tokenizer), "conclusion", "0", 0, num_rows=8)
    teaching = guide.Guide(tokenizer)
    assert set(teaching.targets(batch)) == {samples.COMPARED_LAYER}
    assert 0 < teaching.matched(batch).differs.mean() < 0.5  # more words are equal


@pytest.mark.parametrize("wrong", ["differing", "equal"])
def test_a_word_tells_by_its_first_number_whether_it_differs(wrong):
    matched = guide.Matched(torch.zeros(4, dtype=int), torch.arange(4), torch.tensor([1.0, 0, 0, 0]))
    states = torch.randn(1, 4, 32)
    states[0, :, 0] = torch.tensor([3.0, -3, -3, -3])
    loss, shares = guide.match_loss(matched, states)
    assert shares == {"differing": 1, "equal": 1} and loss < 0.01
    states[0, 0 if wrong == "differing" else 1, 0] *= -1
    worse, shares = guide.match_loss(matched, states)
    assert worse > 1 and shares[wrong] < 1
