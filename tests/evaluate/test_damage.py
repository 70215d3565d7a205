"""What perplexity does not show: each figure on numbers whose answer is known."""

import math

import pytest
import torch

from secateur import Settings, open_model
from secateur.data.tasks import ImageClassification
from secateur.data.tokens import UNLABELLED, Text, Tokens
from secateur.evaluate.agreement import spread
from secateur.evaluate.damage.classes import accuracies, by_class, imbalance, participation
from secateur.evaluate.damage.confidence import calibration_error, confidences
from secateur.evaluate.damage.domains import domains
from secateur.evaluate.damage.recall import SENTENCE, contrast, keys_of, planted, recall
from secateur.evaluate.damage.repetition import repeated, repetition, until
from secateur.evaluate.damage.summary import damage
from secateur.utils.progress import Progress


@pytest.fixture(scope="module")
def demo():
    return open_model("demo", Settings(device="cpu"))


@pytest.fixture(scope="module")
def held(demo):
    return demo.use.held(Text("own", "bundled"), demo.tokenizer, 64, 3)


def test_calibration_error_by_hand():
    """The mistake: bins of equal width, of which one holds nearly everything."""
    sure = torch.tensor([0.9, 0.1, 0.3, 0.2])
    right = torch.tensor([True, False, False, True])
    found = calibration_error(sure, right, bins=2)
    assert found["error"] == pytest.approx(0.5 * abs(0.5 - 0.15) + 0.5 * abs(0.5 - 0.6))
    assert found["gap"] == pytest.approx(0.375 - 0.5)
    assert calibration_error(sure, right, bins=1)["error"] == pytest.approx(0.125)
    assert found["outputs"] == 4


def test_who_says_what_is_true_has_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(60_000, generator=generator)
    right = torch.rand(60_000, generator=generator) < sure
    assert calibration_error(sure, right)["error"] < 0.01
    assert calibration_error(sure.sqrt(), right)["error"] > 0.1
    assert calibration_error(sure.sqrt(), right)["gap"] > 0.1


def test_confidences_are_the_models_own(demo, held):
    sure, right = confidences(demo, held)
    with torch.inference_mode():
        given = demo.module(held.ids).logits[:, :-1].softmax(-1)
    best, place = given.max(-1)
    assert sure.tolist() == pytest.approx(best.flatten().tolist(), 1e-4)
    assert torch.equal(right, (place == held.ids[:, 1:]).flatten())


def test_repeated_grams_by_hand():
    assert repeated([[1, 2, 3, 4, 5, 6]]) == 0
    assert repeated([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3)  # three grams, one kind
    assert repeated([[1, 2, 1, 2, 1, 2], [1, 2, 1, 2]]) == pytest.approx(1 - 3 / 4)  # row by row
    assert repeated([[1, 2, 3], []]) == 0
    assert until([4, 5, 0, 6], [0, 9]) == [4, 5]
    assert until([4, 5], []) == [4, 5]


def test_repetition_is_of_greedy_continuations(demo, held):
    found = repetition(demo, held, demo.positions)
    prompt = held.ids.shape[1] // 2
    with torch.inference_mode():
        rows = [
            demo.module.generate(row[None, :prompt], max_new_tokens=96, do_sample=False)[0, prompt:]
            for row in held.ids
        ]
    ends = [demo.module.generation_config.eos_token_id]
    assert found["repeated"] == pytest.approx(repeated([until(r.tolist(), ends) for r in rows]))
    own = held.ids[:, prompt:].tolist()
    assert found["text"] == pytest.approx(repeated(own))
    assert (found["prompts"], found["tokens"]) == (3, 96)


def test_contrast_does_not_care_what_words_a_model_likes():
    """The mistake: the likeliest of the keys is the model's favourite word, planted or not."""
    likes = torch.tensor([-1.0, -9.0, -4.0])
    blind = likes.expand(3, 3)
    assert contrast([blind, blind]) == {"found": pytest.approx(1 / 3), "nats": 0, "stderr": 0}
    sees = blind + 0.5 * torch.eye(3)
    assert contrast([sees, sees]) == {"found": 1, "nats": pytest.approx(0.5), "stderr": 0}
    mixed = contrast([blind.double(), sees.double()])
    assert (mixed["found"], mixed["nats"]) == (pytest.approx(2 / 3), pytest.approx(0.25))
    assert mixed["stderr"] == pytest.approx(0.25)  # 0 and 0.5: deviation 0.5/√2, over √2
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    nats = [table[k, k] - (table[:, k].sum() - table[k, k]) / 3 for k in range(4)]
    assert contrast([table])["nats"] == pytest.approx(float(sum(nats)) / 4)


def test_keys_are_planted_where_they_should_be(demo):
    filler = list(range(100, 160))
    row = planted(filler, [1, 2, 3], [1, 2], 0.5, 25)
    assert len(row) == 25
    assert row == [*filler[:10], 1, 2, 3, *filler[10:20], 1, 2]
    assert planted(filler, [1], [2], 0.0, 10)[:2] == [1, 100]
    keys = keys_of(demo.tokenizer)
    assert len({ids[0] for ids in keys.values()}) == len(keys) == 4
    for word, ids in keys.items():
        assert demo.tokenizer.decode([*demo.tokenizer.encode(SENTENCE), *ids]).endswith(f" {word}")


class Copier(torch.nn.Module):
    """Says whatever stood behind the last earlier place of the two last tokens."""

    def __init__(self, sees=10**9):
        super().__init__()
        self.sees = sees

    def forward(self, input_ids, use_cache):
        row = input_ids[0].tolist()
        logits = torch.zeros(1, len(row), 2048)
        for i in range(len(row) - 3, max(0, len(row) - self.sees), -1):
            if row[i - 1 : i + 1] == row[-2:]:
                logits[0, -1, row[i + 1]] = 5.0
                break
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("sees", "found"), [(10**9, 1.0), (0, 0.25)])
def test_who_can_look_back_finds_every_key(demo, sees, found):
    from dataclasses import replace

    copier = Copier(sees)
    copier.config, copier.device = demo.config, torch.device("cpu")
    filler = demo.use.held(Text("own", "bundled"), demo.tokenizer, 512, 2).ids.flatten()
    done = []
    answer = recall(replace(demo, module=copier), filler, done.append)
    assert answer["found"] == found
    assert answer["nats"] == pytest.approx(5.0 if found == 1 else 0.0, abs=1e-6)
    assert list(answer["by_length"]) == ["128", "256", "512"]
    assert list(answer["by_depth"]) == ["0.1", "0.5", "0.9"]
    assert sum(done) == 36


def test_who_sees_near_alone_loses_what_was_planted_far(demo):
    from dataclasses import replace

    copier = Copier(40)
    copier.config, copier.device = demo.config, torch.device("cpu")
    filler = demo.use.held(Text("own", "bundled"), demo.tokenizer, 512, 2).ids.flatten()
    answer = recall(replace(demo, module=copier), filler)
    near, far = answer["by_depth"]["0.9"], answer["by_depth"]["0.1"]
    assert near["nats"] > far["nats"] == pytest.approx(0, abs=1e-6)
    assert recall(replace(demo, module=copier), filler[:40]) == {}


def test_domains_are_compared_in_nats():
    assert domains({"a": 10.0}, {"a": 20.0}) == {}
    found = domains({"a": 10.0, "b": 100.0}, {"a": 20.0, "b": 110.0})
    assert found["rise"] == {"a": pytest.approx(math.log(2)), "b": pytest.approx(math.log(1.1))}
    assert found["spread"] == pytest.approx(math.log(2 / 1.1))


def test_accuracy_class_by_class():
    right = torch.tensor([True, False, True, True, False, False])
    labels = torch.tensor([0, 0, 0, 2, 5, 5])
    found = accuracies(right, labels, {0: "cat", 2: "dog"})
    assert found["accuracy"] == {"cat": pytest.approx(2 / 3), "dog": 1.0, "5": 0.0}
    assert (found["least"], found["spread"]) == (0.0, 1.0)


def test_participation_counts_directions():
    eye = torch.eye(5).double()
    assert participation(torch.cat([eye, -eye])) == pytest.approx(5)
    assert participation(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])) == pytest.approx(1)
    assert participation(torch.ones(4, 3)) == 0
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double()
    values = torch.linalg.eigvalsh(rows.T.cov())
    assert participation(rows) == pytest.approx(float(values.sum() ** 2 / (values**2).sum()))


def test_imbalance_is_of_as_many_images_each():
    """The mistake: a class with more images has the higher ratio."""
    rows = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0] * 80 + [1] * 16)
    assert imbalance(rows, labels)["imbalance"] > 0.8
    flat = torch.cat([rows[:80], rows[80:] * torch.tensor([1.0] + [0.0] * 63)])
    assert imbalance(flat, labels)["imbalance"] < 0.2
    assert imbalance(rows, torch.tensor([0] * 90 + [1] * 6)) == {}


@pytest.fixture
def classifier():
    from transformers import ViTConfig, ViTForImageClassification

    from secateur import Model

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
    )
    return Model("vit", ViTForImageClassification(config).eval(), None, torch.float32, None)


def test_classes_of_a_classifier(classifier):
    pixels = torch.randn(24, 1, 8, 8)
    labels = torch.tensor([0] * 10 + [1] * 10 + [UNLABELLED] * 4)
    tokens = Tokens(pixels, torch.ones(24, 5, dtype=torch.bool), labels)
    assert isinstance(classifier.use, ImageClassification)
    with torch.inference_mode():
        hit = classifier.module(pixels).logits.argmax(-1) == labels
        seen = classifier.module.vit(pixels).last_hidden_state[:, 0].double()
    found = by_class(classifier, tokens)
    assert found["accuracy"] == {
        "a": pytest.approx(float(hit[:10].double().mean())),
        "b": pytest.approx(float(hit[10:20].double().mean())),
    }
    both = [participation(part) for part in (seen[:10], seen[10:20])]
    assert found["imbalance"] == pytest.approx(min(both) / max(both), 1e-4)
    assert not classifier.module.classifier._forward_pre_hooks
    assert damage(classifier, tokens, 5, Progress()).keys() == {"confidence", "classes"}


def test_damage_of_a_language_model(demo, held):
    found = damage(demo, held, demo.positions, Progress())
    assert found.keys() == {"confidence", "repetition", "recall"}


def test_rows_are_spread():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 9) == [0, 1, 2]
