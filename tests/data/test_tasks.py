"""What models are for: hidden tokens, images and their classes, agreement with a dense model."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTImageProcessorPil

from secateur import InputError, Settings, open_model
from secateur.calibration import forward_batches as batches
from secateur.calibration.gradients import LOSS, collect_gradients
from secateur.data.tasks import CausalLM, ImageClassification, MaskedLM
from secateur.data.tokens import SET_ASIDE, UNLABELLED, Calibration, Text, Tokens
from secateur.evaluate import agreement as agreements
from secateur.evaluate.agreement import agreement, outputs
from secateur.evaluate.perplexity import answered
from secateur.evaluate.verify import attend_by
from secateur.scoring.calibration_selection import check_choice
from tests.contract.conftest import logits, spread
from tests.support.families import FAMILIES, read, save

# Hidden tokens

MASK, START, END = 5000, 5001, 5002


class Reader:
    """One token a number."""

    eos_token_id = None
    mask_token_id, cls_token_id, sep_token_id = MASK, START, END

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(4000))))
    return Calibration(str(path), samples=100, length=20)


def whole(tokens):
    """The windows as they were, without what stands around them."""
    assert tokens.labels is not None
    return torch.where(tokens.labels == UNLABELLED, tokens.ids, tokens.labels)[:, 1:-1]


def held_text(numbers, start=SET_ASIDE):
    return Text("numbers", numbers.source, start)


def test_windows_stand_between_specials_with_a_part_hidden(numbers):
    tokens = MaskedLM().calibration(numbers, Reader())
    assert tokens.ids.shape == tokens.labels.shape == (100, 20)
    assert bool(tokens.mask.all())
    assert set(tokens.ids[:, 0].tolist()) == {START}
    assert set(tokens.ids[:, -1].tolist()) == {END}
    hidden = tokens.labels != UNLABELLED
    assert torch.equal(hidden, tokens.ids == MASK)
    assert not bool(hidden[:, [0, -1]].any())
    assert float(hidden[:, 1:-1].double().mean()) == pytest.approx(0.15, abs=0.02)
    assert bool((whole(tokens).diff() == 1).all())  # the text


def test_of_every_window_something_is_hidden(numbers):
    tokens = MaskedLM().calibration(replace(numbers, length=3), Reader())
    assert tokens.ids[:, 1].tolist() == [MASK] * 100
    assert len(set(tokens.labels[:, 1].tolist())) > 90


def test_the_seed_draws_windows_and_what_is_hidden(numbers):
    use = MaskedLM()
    one, again, other = (
        use.calibration(replace(numbers, seed=seed), Reader()) for seed in (0, 0, 1)
    )
    assert one.fingerprint == again.fingerprint
    assert not torch.equal(whole(one), whole(other))
    assert not torch.equal(one.labels != UNLABELLED, other.labels != UNLABELLED)
    held = [use.held(held_text(numbers), Reader(), 20, 30) for _ in range(2)]
    assert held[0].fingerprint == held[1].fingerprint


def test_no_window_is_padded(numbers):
    """The mistake: a last, shorter window, padded by tokens that others see from both sides."""
    few = MaskedLM().calibration(replace(numbers, length=1502), Reader())  # of 3200 tokens
    assert len(few) == 2
    assert bool(few.mask.all())
    assert not bool((whole(few)[:, -1] == 0).any())


def test_calibration_and_what_is_judged_on_are_apart(numbers):
    use, every = MaskedLM(), replace(numbers, samples=1000)
    seen, held = use.calibration(every, Reader()), use.held(held_text(numbers), Reader(), 20, 99)
    assert len(seen) == 3200 // 18
    assert len(held) == 800 // 18
    assert int(whole(held)[0, 0]) == 3200
    windows = {tuple(row) for row in whole(seen).tolist()}
    assert windows.isdisjoint(tuple(row) for row in whole(held).tolist())


def test_what_cannot_be_hidden_is_refused(numbers):
    class Bare(Reader):
        mask_token_id = None

    with pytest.raises(InputError, match="no mask"):
        MaskedLM().calibration(numbers, Bare())
    for length in (1, 2):
        with pytest.raises(InputError, match="at least 3"):
            MaskedLM().calibration(replace(numbers, length=length), Reader())
        with pytest.raises(InputError, match="at least 3"):
            MaskedLM().held(held_text(numbers), Reader(), length, 9)


@pytest.mark.parametrize("select", ["kl", "leverage", "dpp"])
def test_choosing_serves_causal_models_alone(numbers, select):
    check_choice(replace(numbers, select=select), CausalLM())
    check_choice(numbers, MaskedLM())
    with pytest.raises(InputError, match=f"{select}.*masked language model"):
        check_choice(replace(numbers, select=select), MaskedLM())


def test_the_loss_is_of_hidden_tokens_alone():
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(2, 4, 5, generator=generator).double()
    labels = torch.tensor([[-100, 3, -100, 0], [-100, -100, 1, -100]])
    tokens = Tokens(torch.zeros(2, 4).long(), torch.ones(2, 4).bool(), labels)
    loss, count = MaskedLM().loss(said, tokens)
    expected = 0.0
    for row, place, right in ((0, 1, 3), (0, 3, 0), (1, 2, 1)):
        chances = said[row, place].exp() / said[row, place].exp().sum()
        expected -= math.log(float(chances[right]))
    assert count == MaskedLM().amount(tokens) == 3
    assert float(loss) == pytest.approx(expected)


def test_figures_are_means_over_all_answers(opened):
    """Of batches of unlike numbers of hidden tokens. The mistake: a mean of means."""
    model, tokens = opened("bert", "float64"), read("bert", 5, 20)
    tokens.labels[1:] = torch.where(torch.arange(20) == 3, 7, UNLABELLED)
    labels = tokens.labels
    said = logits(model.module, tokens)[labels != UNLABELLED]
    right = labels[labels != UNLABELLED]
    loss = torch.nn.functional.cross_entropy(said, right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "TOKENS_PER_BATCH", 20)
        value, share = answered(model, tokens)
    assert value == pytest.approx(float(loss.exp()))
    assert share == pytest.approx(float((said.argmax(-1) == right).double().mean()))


# Images

COLOURS = {"red": 0, "green": 1, "blue": 2}


def drawn(folder, name, number, mode="RGB"):
    """An image that says its number."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    colour = (number, 255 - number, 7) if mode == "RGB" else number
    Image.new(mode, (9, 6), colour).save(folder / name / f"{number}.png")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(40):
        drawn(folder, list(COLOURS)[number % 3], number)
    return folder


@pytest.fixture
def classifier():
    return ImageClassification(positions=17, shape=(3, 16, 16), classes=COLOURS)


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False)


def numbers_of(tokens):
    return [round(float(image[0, 0, 0]) * 255) for image in tokens.ids]


def test_images_are_read_with_the_classes_of_their_folders(images, classifier, processor):
    tokens = classifier.calibration(Calibration(str(images), 99), processor)
    assert tokens.ids.shape == (32, 3, 16, 16)
    assert tokens.mask.shape == (32, 17)
    assert bool(tokens.mask.all())
    assert classifier.amount(tokens) == 32
    assert tokens.labels.tolist() == [number % 3 for number in numbers_of(tokens)]
    assert len(set(tokens.labels.tolist())) == 3


def test_what_is_set_aside_never_calibrates(images, classifier, processor):
    held = classifier.held(Text("rest", str(images), SET_ASIDE), processor, 256, 99)
    assert len(held) == 8
    for seed in range(3):
        chosen = classifier.calibration(Calibration(str(images), 99, seed=seed), processor)
        assert sorted(numbers_of(chosen) + numbers_of(held)) == list(range(40))


def test_the_seed_draws_from_one_order(images, classifier, processor):
    def chosen(seed, samples=10):
        made = Calibration(str(images), samples, seed=seed)
        return numbers_of(classifier.calibration(made, processor))

    assert chosen(0) == chosen(0) == chosen(0, 99)[:10]
    assert chosen(0) != chosen(1)
    every = Text("all", str(images))
    first = numbers_of(classifier.held(every, processor, 256, 5))
    assert first == numbers_of(classifier.held(every, processor, 256, 99))[:5]
    assert first != sorted(first)  # the order of folders would be that of classes


def test_folders_may_bear_numbers_and_hold_folders(tmp_path, classifier, processor):
    drawn(tmp_path, "2", 11)
    drawn(tmp_path, "green/more", 12)
    tokens = classifier.held(Text("t", str(tmp_path)), processor, 1, 9)
    assert dict(zip(numbers_of(tokens), tokens.labels.tolist(), strict=True)) == {11: 2, 12: 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_have_as_many_channels_as_the_model(tmp_path, channels):
    drawn(tmp_path, "red", 5, "L")
    drawn(tmp_path, "red", 6)
    made = ImageClassification(17, (channels, 8, 8), COLOURS)
    side = {"height": 8, "width": 8}
    grey = {"do_normalize": False} if channels == 3 else {"image_mean": [0.5], "image_std": [0.5]}
    processor = ViTImageProcessorPil(size=side, **grey)
    assert made.held(Text("t", str(tmp_path)), processor, 1, 9).ids.shape == (2, channels, 8, 8)


@pytest.mark.parametrize("name", ["gren", "3", "-1"])
def test_unknown_classes_are_refused_with_the_nearest(images, classifier, name):
    drawn(images, name, 200)
    nearest = "green" if name == "gren" else "red"
    with pytest.raises(InputError, match=rf"class '{name}'.*'{nearest}'"):
        classifier.check(str(images))


def test_files_that_are_no_images_are_named(images, classifier, processor):
    (images / "red" / "torn.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"torn\.png"):
        classifier.held(Text("t", str(images)), processor, 1, 99)


@pytest.mark.parametrize("source", ["bundled", "nowhere", "file.txt", "."])
def test_what_is_no_folder_of_images_is_refused(tmp_path, monkeypatch, classifier, source):
    (tmp_path / "file.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="image"):
        classifier.check(source)


def test_without_classes_images_calibrate_and_judge_nothing(
    tmp_path, opened, classifier, processor
):
    for number in range(5):
        drawn(tmp_path, ".", number)
    tokens = classifier.calibration(Calibration(str(tmp_path), 9), processor)
    assert tokens.labels.tolist() == [UNLABELLED] * 4
    model = opened("vit")
    with pytest.raises(InputError, match="subfolders"):
        answered(model, tokens)
    with pytest.raises(InputError, match="subfolders"):
        classifier.check(str(tmp_path))
    with pytest.raises(InputError, match="subfolders"):
        collect_gradients(model, tokens, LOSS.values())


def test_a_few_classes_are_enough_to_judge(monkeypatch, opened, classifier):
    """The mistake: a batch in which no image says its class ends the whole."""
    model, tokens = opened("vit"), read("vit", 6, 17)[:6]
    tokens.labels[[0, 1, 2, 4]] = UNLABELLED
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 17)  # an image at a time
    found = answered(model, tokens)
    assert found == pytest.approx(answered(model, tokens[[3, 5]]))
    assert classifier.amount(tokens) == 2


def test_one_image_does_not_both_calibrate_and_judge(tmp_path, classifier, processor):
    drawn(tmp_path, "red", 5)
    assert len(classifier.held(Text("t", str(tmp_path), SET_ASIDE), processor, 1, 9)) == 1
    with pytest.raises(InputError, match="only one"):
        classifier.calibration(Calibration(str(tmp_path)), processor)


def test_a_processor_of_another_model_is_refused(images, classifier):
    other = ViTImageProcessorPil(size={"height": 8, "width": 8})
    with pytest.raises(InputError, match=r"\(3, 8, 8\).*\(3, 16, 16\)"):
        classifier.calibration(Calibration(str(images), 2), other)


# Heads


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_checkpoint_with_another_head_is_told_so(tmp_path, name):
    """The mistake: a file that is whole is called incomplete."""
    if name == "bert":
        config = transformers.BertConfig(**FAMILIES["bert"].options)
        model, what = transformers.BertForSequenceClassification(config), "masked language model"
    else:
        config = transformers.ViTConfig(**FAMILIES["vit"].options)
        model, what = transformers.ViTModel(config), "image classifier"
    save(model, tmp_path)
    with pytest.raises(InputError, match=f"is a {type(model).__name__}.*{what}"):
        open_model(tmp_path, Settings(device="cpu"))


# Agreement


def test_agreement_is_the_mean_divergence_and_the_share_of_equal_firsts():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    small = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log()
    found = agreement(dense, small)
    one = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    other = 0.1 * math.log(0.5) + 0.7 * math.log(7 / 6)
    assert found["kl"] == pytest.approx((one + other) / 2, rel=1e-5)
    assert found["top1"] == 0.5
    assert agreement(dense, dense) == {"kl": 0.0, "top1": 1.0, "outputs": 2}
    assert agreement(small, dense)["kl"] != pytest.approx(found["kl"], rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_outputs_are_those_that_count(monkeypatch, opened, name):
    model, tokens = opened(name), read(name, 9, 16)
    if name == "llama":
        tokens.mask[2, 5:] = False
    counted = model.use.counted(tokens)
    expected = logits(model.module, tokens)[counted].log_softmax(-1)
    found = outputs(model, tokens)
    assert len(found) == model.use.amount(tokens) < counted.numel() or name == "vit"
    torch.testing.assert_close(found, expected)
    for rows in (1, 4):  # which outputs are kept has nothing to do with batches
        monkeypatch.setattr(batches, "rows_at_once", lambda *_, rows=rows: rows)
        monkeypatch.setattr(agreements, "MOST_NUMBERS", 3 * expected.shape[1])
        step = math.ceil(len(expected) / 3)
        torch.testing.assert_close(outputs(model, tokens), expected[::step])


def test_outputs_come_from_all_of_the_text(monkeypatch, opened):
    """The mistake: only the beginning of a text is compared."""
    model, tokens = opened("llama"), read("llama", 10, 16)
    monkeypatch.setattr(agreements, "OUTPUTS", 48)
    expected = logits(model.module, tokens[[0, 3, 6]]).flatten(0, 1).log_softmax(-1)
    torch.testing.assert_close(outputs(model, tokens), expected)


def test_what_is_impossible_in_both_costs_nothing_and_nan_is_refused():
    """The mistake: max(0, NaN) is 0, and all looks well."""
    dense = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert agreement(dense, dense)["kl"] == 0.0
    with pytest.raises(InputError, match="not finite"):
        agreement(dense, torch.tensor([[0.0, 1.0, 0.0]]).log())
    with pytest.raises(InputError, match="not finite"):
        agreement(dense, dense * torch.nan)


# Attention that sees both sides


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_no_token_is_kept_from_those_behind_it(opened, dense, name):
    """And the mistake put back: a rebuilt attention that fused kernels take for a causal one."""
    model, given = opened(name, "float64"), read(name, 1, 24)
    attend_by(model.module, "sdpa")
    stock = FAMILIES[name].auto.from_pretrained(dense(name)).eval().double()
    expected = logits(stock, given)
    attentions = [block.attention.module for block in model.blocks]
    assert spread(logits(model.module, given), expected) < 1e-5
    assert not any(attention.is_causal for attention in attentions)
    for attention in attentions:
        attention.is_causal = True
    assert spread(logits(model.module, given), expected) > 1e-2
