"""Sizes for a runtime: what units offer, what methods and allocators make of it, and refusals."""

from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import pytest

from secateur import Budget, InputError, Settings
from secateur.allocate import ALLOCATORS, allocator_class
from secateur.data.tasks import PREFIX
from secateur.export.gguf.shapes import layout_of
from secateur.methods import method_class
from secateur.models.loading import skeleton
from secateur.pipeline.prepare import check_reach
from secateur.pipeline.runtime_checks import check_runtime
from secateur.structure.runtime_limits import fitted
from tests.support.made import heads, mlp, query_key, value_output
from tests.support.steps import step_of


@pytest.mark.parametrize(
    ("runtime", "size", "sizes"),
    [
        ("transformers", 100, [0, *range(8, 100, 8), 100]),
        ("gguf", 100, [32, 64, 96, 100]),
        ("gguf", 64, [32, 64]),
        ("gguf", 32, [32]),
        ("gguf", 20, [20]),
        ("gguf-q4", 704, [256, 512, 704]),
        ("gguf-q4", 256, [256]),
        ("vllm", 200, [64, 128, 192, 200]),
    ],
)
def test_widths_are_multiples_and_never_none(runtime, size, sizes):
    assert fitted(mlp("layers.0", size), runtime).sizes() == sizes


def test_a_coarser_grain_of_the_users_is_kept_to():
    assert fitted(mlp("layers.0", 200, step=48), "gguf").sizes() == [96, 192, 200]


@pytest.mark.parametrize(
    ("runtime", "unit", "sizes"),
    [
        ("gguf", heads("layers.0", size=4, group=2, width=4), [4]),  # 8 of a head's outputs each
        ("gguf", heads("layers.0", size=4, group=2, width=8), [2, 4]),
        ("gguf", heads("layers.0", size=4, group=1, width=64), [1, 2, 3, 4]),
        ("gguf-q4", heads("layers.0", size=8, group=2, width=64), [2, 4, 6, 8]),
        ("vllm", heads("layers.0", size=4, group=1, width=64), [4]),
        ("transformers", heads("layers.0", size=2), [0, 1, 2]),
    ],
)
def test_heads_fill_whole_blocks_and_some_stay(runtime, unit, sizes):
    assert fitted(unit, runtime).sizes() == sizes


@pytest.mark.parametrize("runtime", ["vllm", "gguf", "gguf-q4"])
def test_heads_keep_their_width(runtime):
    assert fitted(query_key("layers.0", 16), runtime).sizes() == [16]
    assert fitted(value_output("layers.0", 16), runtime).sizes() == [16]


def test_what_a_method_spares_stays_spared():
    spared = replace(mlp("layers.0", 64), least=64)
    assert fitted(spared, "gguf").sizes() == [64]


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_offers_what_the_runtime_reads(name):
    unit = fitted(mlp("layers.0", 704), "gguf-q4")
    assert set(allocator_class(name)().choices(unit)) <= {256, 512, 704}


@pytest.fixture(scope="module")
def wide():
    """A skeleton with MLPs of more than one multiple of 64."""
    return skeleton(str(files("secateur") / "data" / "demo-model"), Settings(device="cpu"))


def refused(shapes, method, runtime, *words, tier="per-layer", **options):
    method = method_class(method)(**options)
    step = step_of(method, tier=tier, runtime=runtime)
    with pytest.raises(InputError) as error:
        check_runtime(shapes, step)
    for word in (f"--for {runtime}", *words):
        assert word in str(error.value), (word, str(error.value))


def test_forms_gain_nothing_in_llama_cpp(opened):
    refused(opened("llama"), "svd", "gguf", "svd", "multiplied out", "q4_k_m")
    refused(opened("llama"), "rtn", "gguf-q4", "rtn")


def test_vllm_reads_integers_but_no_layers_of_our_own(opened):
    refused(opened("llama"), "svd", "vllm", "svd", "rtn")
    check_runtime(opened("llama"), step_of(method_class("rtn")(), runtime="vllm"))


@pytest.mark.parametrize("method", ["auto", "modegpt", "flap", "wanda-sp", "cfsp"])
def test_vllm_opens_stock_shapes_alone(opened, method):
    refused(opened("llama"), method, "vllm", method, "--tier plain", "shortgpt")


def test_vllm_takes_one_wide_mlp_and_fewer_blocks(wide):
    refused(wide, "auto", "vllm", "--tier plain")
    check_runtime(wide, step_of(method_class("auto")(), tier="plain", runtime="vllm"))
    check_runtime(wide, step_of(method_class("shortgpt")(), runtime="vllm"))
    check_runtime(wide, step_of(method_class("replace")(compensate=0), runtime="vllm"))
    refused(wide, "replace", "vllm", "--compensate 0")


def test_what_has_shapes_of_our_own_is_none_for_vllm(opened):
    model = opened("llama")
    model.config.model_type = f"{PREFIX}llama"
    refused(model, "auto", "vllm", "export", "--to plain", tier="plain")
    refused(model, "rtn", "vllm", "export", "--to plain")


def test_a_sliced_stream_is_for_transformers(opened):
    for runtime in ("gguf", "vllm"):
        refused(opened("llama"), "slicegpt", runtime, "residual stream")
    check_runtime(opened("llama"), step_of(method_class("slicegpt")()))


def test_families_that_are_not_written_are_refused_but_for_one_width(opened):
    refused(opened("gemma"), "auto", "gguf", "gemma", "--tier plain")
    plain = step_of(method_class("auto")(), tier="plain", runtime="gguf")
    check_runtime(opened("gemma"), plain)
    check_runtime(opened("gemma"), step_of(method_class("shortgpt")(), runtime="gguf"))


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, ("gelu", "silu")),
        ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, ("dynamic", "llama3")),
        (
            "mistral",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ("don't turn",),
        ),
        ("qwen3", {"rope_parameters": YARN, "tie_word_embeddings": True}, ("yarn", "openelm")),
    ],
)
def test_what_the_export_refuses_is_refused_at_once(opened, name, fields, words):
    model = opened(name)
    for field, value in fields.items():
        setattr(model.config, field, value)
    for tier in ("per-layer", "plain"):
        refused(model, "auto", "gguf", *words, "export --to gguf", tier=tier)
    with pytest.raises(InputError, match=words[0]):
        layout_of(model)


@pytest.mark.parametrize(
    ("name", "rope"), [("llama", YARN), ("qwen3", YARN | {"rope_type": "linear", "factor": 1.0})]
)
def test_frequencies_that_a_file_has_are_let_through(opened, name, rope):
    model = opened(name)
    model.config.rope_parameters, model.config.tie_word_embeddings = rope, True
    check_runtime(model, step_of(method_class("auto")(), runtime="gguf"))


def test_an_untied_qwen3_gets_one_width(opened):
    refused(opened("qwen3"), "auto", "gguf", "openelm", "--tier plain")


def test_a_qwen3_gets_no_bias(opened):
    model = opened("qwen3")
    model.config.tie_word_embeddings = True
    refused(model, "flap", "gguf", "bias", "--compensate 0")
    check_runtime(model, step_of(method_class("flap")(compensate=0), runtime="gguf"))


def test_nothing_to_change_is_said_with_the_unit_that_is_too_small(opened):
    refused(opened("llama"), "auto", "gguf-q4", "layers.0.mlp", "56", "256", "--for gguf")


def test_a_runtime_is_no_target_and_the_message_says_what_it_is():
    with pytest.raises(InputError, match=r"--for gguf-q4"):
        Budget(target="gguf-q4")
    with pytest.raises(InputError, match=r"'gugf'.*Did you mean 'gguf'"):
        Budget(runtime="gugf")


def test_reach_counts_only_sizes_that_the_runtime_reads(opened):
    model, method = opened("llama"), method_class("auto")()
    check_reach(model, step_of(method, 0.3))
    with pytest.raises(InputError, match="out of reach"):
        check_reach(model, step_of(method, 0.3, runtime="gguf"))


def test_sizes_stay_in_order():
    for unit in (mlp("layers.0", 1000), heads("layers.0", size=8, width=24)):
        for runtime in ("gguf", "gguf-q4"):
            assert all(a < b for a, b in pairwise(fitted(unit, runtime).sizes()))
