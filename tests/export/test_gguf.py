"""GGUF files: read back with the library gguf, computed by hand, and run in llama.cpp."""

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur import InputError
from secateur.apply.surgery import narrow_unit
from secateur.export.gguf import check, export, shapes
from secateur.export.gguf.check import Finding, compare, judge, reference
from secateur.export.gguf.export import check_request, export_gguf, make, prepared
from secateur.export.gguf.tokens import vocabulary
from secateur.export.gguf.writer import part_of, write
from secateur.structure.narrowing import Narrowing
from secateur.utils.errors import RunError
from secateur.utils.progress import Progress

gguf = pytest.importorskip("gguf", reason="the library gguf is not installed")
from tests.support.ggufs import File, logits  # noqa: E402

runs = pytest.mark.skipif(
    find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: pip install 'secateur[gguf]'",
)
WIDTHS = [{"mlp": 24}, {"mlp": 56}, {"mlp": 37}]
HEADS = [{"mlp": 24}, {"heads": 1}, {}]
MIXED = [
    {"query_key": 6, "value_output": 5, "mlp": 24},
    {"query_key": 2, "value_output": 8},
    {"query_key": 0, "value_output": 3, "mlp": 9},
]
GONE = [{"heads": 0}, {"mlp": 0}, {"heads": 0, "mlp": 0}]
LATER = [{}, {"heads": 0}, {"heads": 0, "mlp": 0}]
CASES = [
    *((name, cut) for name in ("llama", "qwen2", "qwen3") for cut in ("stock", "widths", "heads")),
    *((name, cut) for name in ("llama", "qwen2", "qwen3") for cut in ("gone", "later")),
    ("llama", "mixed"),
    ("qwen2", "mixed"),
    ("qwen3", "values"),
    ("llama_biased_tied", "widths"),
    ("llama_biased_tied", "gone"),
    ("llama_scaled_rope", "mixed"),
    ("llama_yarn", "widths"),
    ("llama_yarn", "mixed"),
    ("llama_wide_heads", "heads"),
    ("mistral", "widths"),
]
CUTS = {
    "stock": [{}, {}, {}],
    "widths": WIDTHS,
    "heads": HEADS,
    "mixed": MIXED,
    "gone": GONE,
    "later": LATER,
    "values": [{"value_output": 5}, {"mlp": 24}, {"value_output": 2}],
}


def narrow(model, cuts, shared=None):
    """Bring axes to sizes, with whatever stays drawn at random."""
    draw = torch.Generator().manual_seed(1)
    kinds = ("mlp", "heads", "query_key", "value_output")
    for block, sizes in zip(model.blocks, cuts, strict=True):
        for unit in block.units(1, kinds):
            if unit.kind not in sizes:
                continue
            size, kv = sizes[unit.kind], block.attention.module.kv_heads
            if unit.kind in ("mlp", "heads"):
                keep = torch.randperm(unit.size, generator=draw)[:size].sort().values
                narrowing = Narrowing(keep=keep)
            elif unit.kind == "query_key":
                drawn = [torch.randperm(unit.size // 2, generator=draw) for _ in range(kv)]
                if shared is not None:
                    drawn = [shared] * kv
                half = torch.stack([d[: size // 2].sort().values for d in drawn])
                narrowing = Narrowing(keep=torch.cat((half, half + unit.size // 2), 1))
            else:
                encode = torch.randn(kv, unit.size, size, generator=draw).double()
                rows = torch.randn(block.attention.module.heads * size, unit.hidden, generator=draw)
                narrowing = Narrowing(encode=encode / 3, consumer=rows.double() / 5)
            narrow_unit(block, unit, narrowing)
    return model


@pytest.fixture
def made(opened):
    """A variant, cut; a Qwen3 is tied."""

    def model_of(name, cut="stock"):
        model = opened(name)
        if name == "qwen3":
            tie(model)
        return narrow(model, CUTS[cut])

    return model_of


def tie(model):
    model.module.lm_head.weight = model.module.get_input_embeddings().weight
    model.config.tie_word_embeddings = True


def written(model, path, kind="f32"):
    layout, _ = prepared(model, kind, False, Progress())
    write(model, layout, None, kind, path)
    return layout


def said(model, ids):
    with torch.inference_mode():
        return model.module(torch.tensor([ids])).logits[0].double()


IDS = [5, 80, 3, 41, 41, 7, 66, 12, 90, 2]


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_a_file_computes_the_model(made, tmp_path, name, cut):
    model = made(name, cut)
    written(model, tmp_path / "m.gguf")
    expected = said(model, IDS)
    apart = (logits(tmp_path / "m.gguf", IDS) - expected).abs().max() / expected.std()
    assert apart < 2e-5


@runs
@pytest.mark.parametrize(
    ("name", "cut"),
    [(n, c) for n, c in CASES if n in ("llama", "qwen2", "qwen3")] + [("llama_yarn", "mixed")],
)
def test_llama_cpp_computes_the_model_and_goes_on_alike(made, tmp_path, name, cut):
    model = made(name, cut)
    written(model, tmp_path / "m.gguf")
    found = compare(tmp_path / "m.gguf", "f32", reference(model), None)
    assert found.same == found.greedy == 16
    assert found.largest < 1e-4


@pytest.mark.parametrize(
    ("name", "cut", "architecture"),
    [
        ("llama", "stock", "llama"),
        ("llama", "widths", "deci"),
        ("mistral", "stock", "llama"),
        ("qwen2", "stock", "qwen2"),
        ("qwen2", "widths", "deci"),
        ("qwen3", "stock", "qwen3"),
        ("qwen3", "widths", "openelm"),
        ("llama_biased_tied", "heads", "deci"),
    ],
)
def test_the_simplest_architecture_that_will_do_is_taken(made, name, cut, architecture):
    assert shapes.layout_of(made(name, cut)).architecture.name == architecture


def test_rows_of_queries_and_keys_become_neighbours_and_nothing_else_moves(made, tmp_path):
    model = made("llama_biased_tied")
    written(model, tmp_path / "m.gguf")
    file, state = File(tmp_path / "m.gguf"), model.module.state_dict()
    for ours, theirs, heads in (("q", "q", 4), ("k", "k", 2)):
        for part in ("weight", "bias"):
            stock = state[f"model.layers.1.self_attn.{ours}_proj.{part}"]
            halves = stock.reshape(heads, 2, 4, *stock.shape[1:])
            turned = halves.swapaxes(1, 2).reshape(stock.shape)
            assert torch.equal(file.tensors[f"blk.1.attn_{theirs}.{part}"].float(), turned)
    for ours, theirs in (
        ("self_attn.v_proj.weight", "attn_v.weight"),
        ("self_attn.o_proj.weight", "attn_output.weight"),
        ("self_attn.o_proj.bias", "attn_output.bias"),
        ("mlp.gate_proj.weight", "ffn_gate.weight"),
        ("mlp.up_proj.bias", "ffn_up.bias"),
        ("mlp.down_proj.weight", "ffn_down.weight"),
        ("input_layernorm.weight", "attn_norm.weight"),
        ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ):
        stock = state[f"model.layers.1.{ours}"]
        assert torch.equal(file.tensors[f"blk.1.{theirs}"].float(), stock)
    assert "output.weight" not in file.tensors


def test_sizes_that_differ_are_lists_and_others_are_numbers(made, tmp_path):
    written(made("llama", "heads"), tmp_path / "m.gguf")
    file = File(tmp_path / "m.gguf")
    assert file.field("feed_forward_length") == [24, 56, 56]
    assert file.field("attention.head_count") == [4, 2, 4]
    assert file.field("attention.head_count_kv") == [2, 1, 2]
    assert file.field("attention.key_length") == 8
    assert file.field("vocab_size") == 99
    written(made("llama"), tmp_path / "n.gguf")
    assert File(tmp_path / "n.gguf").field("feed_forward_length") == 56


def test_a_layer_without_attention_has_no_head_but_the_first_has_one_of_zeros(made, tmp_path):
    written(made("llama", "gone"), tmp_path / "m.gguf")
    file = File(tmp_path / "m.gguf")
    assert file.field("attention.head_count") == [1, 4, 0]
    assert not file.tensors["blk.0.attn_output.weight"].any()
    assert file.field("feed_forward_length") == [56, 1, 1]
    assert not file.tensors["blk.1.ffn_down.weight"].any()


def test_pairs_that_all_heads_share_make_a_narrower_head(opened, tmp_path):
    shared = torch.tensor([0, 1, 3])
    model = narrow(opened("llama"), [{"query_key": 6, "value_output": 6}] * 3, shared)
    layout = written(model, tmp_path / "m.gguf")
    assert (layout.head, layout.pairs) == (6, (0, 1, 3))
    file = File(tmp_path / "m.gguf")
    frequencies = 10000.0 ** (-torch.arange(4).double() / 4)
    usual = 10000.0 ** (-torch.arange(3).double() / 3)
    expected = usual / frequencies[shared]
    torch.testing.assert_close(file.tensors["rope_freqs.weight"], expected, rtol=1e-6, atol=0)
    expected = said(model, IDS)
    assert (logits(tmp_path / "m.gguf", IDS) - expected).abs().max() / expected.std() < 2e-5


@runs
def test_llama_cpp_turns_shared_pairs_by_their_factors(opened, tmp_path):
    shared = torch.tensor([0, 1, 3])
    model = narrow(opened("llama"), [{"query_key": 6, "value_output": 6}] * 3, shared)
    written(model, tmp_path / "m.gguf")
    assert compare(tmp_path / "m.gguf", "f32", reference(model), None).largest < 1e-4


def test_the_context_ends_where_tokens_would_see_further_than_the_model(made, tmp_path):
    written(made("mistral"), tmp_path / "m.gguf")
    assert File(tmp_path / "m.gguf").field("context_length") == 12
    written(made("llama"), tmp_path / "n.gguf")
    assert File(tmp_path / "n.gguf").field("context_length") == 64


def test_q8_0_takes_rows_of_whole_blocks_and_float16_the_others(made, tmp_path):
    model = made("llama", "widths")
    written(model, tmp_path / "m.gguf", "q8_0")
    file = File(tmp_path / "m.gguf")
    assert file.types["blk.0.ffn_gate.weight"] == "Q8_0"  # rows of 32
    assert file.types["blk.0.ffn_down.weight"] == "F16"  # of 24
    assert file.types["blk.0.attn_norm.weight"] == "F32"
    gate = model.module.state_dict()["model.layers.0.mlp.gate_proj.weight"]
    steps = gate.abs().amax(1, keepdim=True) / 127  # stored as float16
    assert bool(((file.tensors["blk.0.ffn_gate.weight"] - gate).abs() <= 0.6 * steps).all())


def test_numbers_beyond_float16_are_refused():
    with pytest.raises(InputError, match="--type bf16"):
        part_of("x.weight", torch.full((2, 32), 1e5), "f16")
    assert part_of("x.weight", torch.full((2, 32), 1e5), "bf16").kind == "bf16"


# what no file can hold


def refused(model, *words):
    with pytest.raises(InputError) as error:
        shapes.layout_of(model)
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def test_an_untied_qwen3_with_sizes_by_layer_is_refused(opened):
    refused(narrow(opened("qwen3"), WIDTHS), "MLP widths (24, 56, 37)", "--tier plain", "openelm")


def test_a_qwen3_with_an_output_bias_is_refused(made):
    model = made("qwen3", "widths")
    model.blocks[1].mlp.consumer.bias = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    refused(model, "layers.1", "--compensate 0")


def test_other_families_are_refused(opened):
    refused(opened("gemma"), "gemma", "llama, mistral, qwen2, qwen3")


def test_a_sliced_stream_is_refused(made):
    model = made("llama")
    model.config.secateur = {"layers": [], "residual": {"size": 16}}
    refused(model, "sliced residual stream")


def test_frequencies_that_change_with_the_length_are_refused(made):
    model = made("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused(model, "dynamic", "number of tokens")


def test_another_activation_is_refused(made):
    model = made("llama")
    model.config.hidden_act = "gelu"
    refused(model, "gelu", "silu")


# tokenizers


def bpe(cutter=None, merges=(("a", "b"), ("ab", "c")), **more):
    if cutter is None:
        cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [*"abc", *("".join(pair) for pair in merges)]
    names = ["<s>", "</s>", "<unk>", *dict.fromkeys(pieces)]
    kind = models.BPE({n: i for i, n in enumerate(names)}, list(merges), unk_token="<unk>", **more)
    made = Tokenizer(kind)
    made.pre_tokenizer = cutter
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_rows_without_a_token_are_unused_and_special_tokens_are_control():
    words = vocabulary(bpe(), 10)
    assert (words.model, words.pre, words.scores) == ("gpt2", "gpt-2", None)
    assert words.tokens[:3] == ("<s>", "</s>", "<unk>")
    assert words.tokens[8:] == ("[PAD8]", "[PAD9]")
    assert words.types == (3, 3, 1, 1, 1, 1, 1, 1, 5, 5)


def test_scores_of_a_sentencepiece_bpe_fall_with_the_rank_of_the_merge():
    words = vocabulary(bpe(pre_tokenizers.Metaspace(), byte_fallback=True), 8)
    at = dict(zip(words.tokens, words.scores, strict=True))
    assert words.model == "llama"
    assert at["ab"] > at["abc"] > at["a"]
    assert words.types[2] == 2  # unknown
    assert words.space_prefix is True


def test_a_way_of_cutting_is_known_by_its_expressions():
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter = pre_tokenizers.Sequence([digits, plain])
    assert vocabulary(bpe(cutter), 8).pre == "smollm"


@pytest.mark.parametrize(
    ("tokenizer", "word"),
    [
        (bpe(pre_tokenizers.Whitespace()), "Whitespace"),
        (bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "ByteLevel"),
        (SimpleNamespace(), "SimpleNamespace"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tokenizer, word):
    with pytest.raises(InputError, match=word) as error:
        vocabulary(tokenizer, 8)
    assert "--no-tokenizer" in str(error.value)


def test_another_kind_of_tokenizer_is_refused(dense, tmp_path):
    with pytest.raises(InputError, match=r"WordLevel.*--no-tokenizer"):
        export_gguf(dense("llama"), tmp_path / "m.gguf", checked=False)
    assert not [*tmp_path.iterdir()]


# the check, and what comes before it


def test_a_file_without_a_check_is_said_to_be_unchecked(dense, tmp_path):
    heard = []
    progress = Progress()
    progress.say = heard.append
    out = tmp_path / "m.gguf"
    made = export_gguf(dense("llama"), out, tokenizer=False, checked=False, progress=progress)
    assert (made.kind, made.finding) == ("f32", None)
    assert "WARNING" in heard[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@runs
def test_a_file_that_computes_something_else_does_not_appear(dense, tmp_path, monkeypatch):
    right = export.layout_of

    def wrong(model):
        return replace(right(model), turned=1.5)

    monkeypatch.setattr(export, "layout_of", wrong)
    with pytest.raises(RunError, match="does not compute the model"):
        export_gguf(dense("llama"), tmp_path / "m.gguf", tokenizer=False)
    assert not [*tmp_path.iterdir()]


@runs
@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("llama", "f16", 0.01),
        ("qwen2", "bf16", 0.05),
        ("llama", "q8_0", 0.05),
        ("llama", "q4_k_m", 0.4),
        ("qwen2", "q4_k_m", 0.4),
        ("qwen3", "q4_k_m", 0.4),
    ],
)
def test_other_formats_run(made, tmp_path, name, kind, most):
    model = made(name, "widths")
    layout, _ = prepared(model, kind, False, Progress())
    path, found = make(model, layout, None, kind, True, tmp_path, Progress())
    assert path.name == f"{kind}.gguf"
    assert found.root_mean_square < most
    if kind == "q4_k_m":
        assert File(path).types["blk.0.ffn_gate.weight"] not in ("F32", "F16")


def test_a_file_that_differs_is_refused():
    judge(Finding(5e-4, 1e-4, 16, 16), "f32")
    with pytest.raises(RunError, match=r"0\.002"):
        judge(Finding(2e-3, 1e-4, 16, 16), "f32")
    with pytest.raises(RunError, match="q8_0"):
        judge(Finding(1.0, 0.3, 9, 16), "q8_0")
    with pytest.raises(RunError, match="f32"):
        judge(Finding(float("nan"), float("nan"), 0, 16), "f32")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("m.gguf", {"kind": "q9"}, ["q9", "q8_0"]),
        ("m.bin", {}, ["one file", "m.gguf"]),
        ("nowhere/m.gguf", {}, ["no folder"]),
        ("there.gguf", {}, ["exists", "--overwrite"]),
    ],
)
def test_requests_are_refused_before_a_weight_is_read(tmp_path, name, options, words):
    (tmp_path / "there.gguf").touch()
    given = {"kind": "auto", "overwrite": False, "checked": False} | options
    with pytest.raises(InputError) as error:
        check_request(tmp_path / name, **given)
    assert all(word in str(error.value) for word in words)


def test_what_is_missing_is_named_with_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda _: None)
    out = tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"pip install 'secateur\[gguf\]'.*--unchecked"):
        check_request(out, "auto", overwrite=False, checked=True)
    with pytest.raises(InputError, match=r"quantizer.*q8_0"):
        check_request(out, "q4_k_m", overwrite=False, checked=False)
    check_request(out, "q8_0", overwrite=False, checked=False)
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="library gguf"):
        check_request(out, "f32", overwrite=False, checked=False)
