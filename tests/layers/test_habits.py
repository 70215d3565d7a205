"""What people do with a transformers model, done with compressed checkpoints."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from secateur.layers import modeling_secateur
from secateur.layers.factored_secateur import Factored, LowRank
from secateur.methods.compot import COMPOT
from secateur.methods.form import Metric, stacked
from tests.contract.conftest import spread
from tests.support.families import FAMILIES, read, tokenizer
from tests.support.shaped import shaped

IDS = read("llama", 1, 24, seed=3).ids
SIZES = {
    "layered": {
        "layers.0.mlp": 40,
        "layers.1.query_key": 4,
        "layers.1.value_output": 3,
        "layers.2.mlp": 24,
        "layers.2.value_output": 5,
        "layers.2.query_key": 6,
    },
    "gone": {"layers.0.value_output": 0, "layers.0.query_key": 0, "layers.2.mlp": 0},
    "factored": {"layers.1.value_output": 3},
    "shared": {"layers.1.value_output": 3},
}
KINDS = ("llama layered", "llama gone", "llama factored", "llama shared", "gpt2 layered")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def folder(opened, tmp_path_factory):
    """Family and kind to a checkpoint: of layers of other shapes, without parts, of other forms."""
    root = tmp_path_factory.mktemp("habits")

    @cache
    def make(kind):
        name, _, how = kind.partition(" ")
        out, reshape = root / kind.replace(" ", "-"), {"factored": low_rank, "shared": shared}
        shaped(opened(name), out, SIZES[how], reshape=reshape.get(how))
        tokenizer().save_pretrained(out)
        return out

    return make


def low_rank(block):
    for path in ("mlp.up_proj", "self_attn.q_proj"):
        outputs, inputs = block.module.get_submodule(path).weight.shape
        spec = {"form": "low_rank", "outputs": outputs, "inputs": inputs, "bias": False, "rank": 8}
        block.module.set_submodule(path, made := LowRank(spec))
        for parameter in made.parameters():
            parameter.data.normal_(std=0.2)


def shared(block):
    """One dictionary for queries and keys."""
    method = COMPOT(share=1, sweeps=1)
    group = [x for x in block.linear_layers if x.path.endswith(("q_proj", "k_proj"))]
    weight = stacked(group).double()
    form = method.forms(*weight.shape, False)[0]
    metric = Metric.identity(weight.shape[1], weight)
    for path, layer in method.replacing(group, weight, metric, form).items():
        block.module.set_submodule(path, layer)


@pytest.fixture
def opening(folder):
    def open_(kind, **options):
        return AutoModelForCausalLM.from_pretrained(folder(kind), **options).eval()

    return open_


def said(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def written(model, **options):
    mask = torch.ones_like(IDS)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0} | options
    torch.manual_seed(0)
    return model.generate(IDS, attention_mask=mask, **given)[0, IDS.shape[1] :]


MODES = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
}


@every_kind
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_is_that_without(opening, kind, mode):
    model = opening(kind)
    cached, uncached = (written(model, use_cache=c, **MODES[mode]) for c in (True, False))
    assert torch.equal(cached, uncached)


@every_kind
def test_speculation_changes_no_greedy_token(opening, kind):
    """Prompt look-up and an assistant both crop the cache behind what is not accepted."""
    model = opening(kind)
    greedy = written(model, do_sample=False, max_new_tokens=12)
    looked = written(model, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(looked, greedy)
    helper = opening("llama layered")
    assisted = written(model, do_sample=False, max_new_tokens=12, assistant_model=helper)
    assert torch.equal(assisted, greedy)


@every_kind
def test_a_cache_of_fixed_size_changes_no_token(opening, kind):
    model = opening(kind)
    greedy = written(model, do_sample=False)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(written(model, do_sample=False, **options), greedy)


@every_kind
def test_pipelines_write(folder, opening, kind):
    reader = AutoTokenizer.from_pretrained(folder(kind))
    write = pipeline("text-generation", model=opening(kind), tokenizer=reader)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = write(["w3 w5 w8", "w1"], batch_size=2, **options)
    alone = write("w3 w5 w8", **options)
    assert found[0][0]["generated_text"] == alone[0]["generated_text"]
    assert alone[0]["generated_text"].startswith("w3 w5 w8")


@every_kind
def test_placed_and_offloaded_models_say_the_same(opening, tmp_path, kind):
    pytest.importorskip("accelerate")
    expected = said(opening(kind))
    for place in ("cpu", "auto"):
        torch.testing.assert_close(said(opening(kind, device_map=place)), expected)
    blocks = "model.layers" if kind.startswith("llama") else "transformer.h"
    whole = opening(kind)
    parts = [name for name, _ in whole.named_parameters() if f"{blocks}." not in name]
    places = {name.rpartition(".")[0]: "cpu" for name in parts}
    places["lm_head"] = "cpu"  # perhaps the embedding, which is named once
    places |= {f"{blocks}.{i}": "disk" if i else "cpu" for i in range(3)}
    model = opening(kind, device_map=places, offload_folder=tmp_path)
    offloaded = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    assert any(f"{blocks}.2." in name for name in offloaded)
    torch.testing.assert_close(said(model), expected)
    assert torch.equal(written(model, do_sample=False), written(whole, do_sample=False))


def test_no_block_is_split_between_devices(opening):
    accelerate = pytest.importorskip("accelerate")
    model = opening("llama layered")
    found = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": 70_000, "disk": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    assert (found["model.layers.0"], found["model.layers.1"]) == ("cpu", "disk")


def test_no_sliced_block_is_split_either():
    stock = FAMILIES["llama"]
    places = {"attention_norm": "input_layernorm", "attention": "self_attn"}
    places |= {"mlp_norm": "post_attention_layernorm", "mlp": "mlp"}
    residual = {"size": 24, "last_norm": "norm", "places": places}
    shapes = {"blocks": "layers", "attention": "self_attn", "layers": [{}] * 3}
    config = modeling_secateur.SecateurLlamaConfig(
        **stock.options, secateur=shapes | {"residual": residual}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {type(block).__name__ for block in model.model.layers} <= set(model._no_split_modules)


@pytest.mark.parametrize(
    "kind",
    ["llama layered", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if "factored" in k)],
)
def test_the_forward_compiles_as_one_graph(opening, kind):
    """The graph is what torch traces; making machine code of it takes minutes and adds nothing."""
    model = opening(kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, said(model))


@every_kind
def test_adapters_learn_save_load_and_merge(opening, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = opening(kind)
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "weight")
        and module.weight.dim() == 2
        and module.weight.numel()
        and not isinstance(module, torch.nn.Embedding)
        and name not in ("lm_head",)
    }
    empty = [
        n
        for n, m in model.named_modules()
        if (w := getattr(m, "weight", None)) is not None and not w.numel()
    ]
    expected = said(model)
    config = peft.LoraConfig(
        target_modules=sorted(linears), exclude_modules=empty or None, r=2, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(said(adapted), expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = said(adapted)
    assert not torch.allclose(learned, expected, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(opening(kind), tmp_path)
    torch.testing.assert_close(said(again), learned)
    torch.testing.assert_close(said(again.merge_and_unload()), learned, rtol=1e-4, atol=1e-4)


@every_kind
def test_more_embeddings_leave_old_tokens_as_they_are(opening, kind):
    model = opening(kind)
    before = said(model)
    model.resize_token_embeddings(120)
    torch.testing.assert_close(said(model)[..., :99], before)
    assert said(model, IDS + 20).shape[-1] == 120


@every_kind
def test_halves_are_near(opening, kind):
    exact = said(opening(kind))
    rough = 0.5 if kind == "llama shared" else 0.2  # sums of rounded atoms times rounded codes
    assert spread(said(opening(kind).bfloat16()), exact) < rough
    assert spread(said(opening(kind).half()), exact) < 0.05


@every_kind
def test_checkpointed_gradients_are_the_same(opening, kind):
    def gradients(checkpointed):
        model = opening(kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)  # of dropout
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert set(plain) == set(again)
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected)


@every_kind
def test_a_changed_model_saves_and_loads_again(opening, folder, tmp_path, kind):
    model = opening(kind)
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path / "again")
    saved = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert saved == {path.name for path in folder(kind).glob("*.py")}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(said(again.eval()), said(model))


STRANGER = """
import sys
sys.modules["secateur"] = None
import torch
from transformers import AutoModelForCausalLM, pipeline
source, again, offload, expected = sys.argv[1:]
said = torch.load(expected)
given = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(source, **given).eval()
read = lambda model: model(input_ids=said["ids"]).logits.detach()
torch.testing.assert_close(read(model), said["logits"])
model.save_pretrained(again)
saved = AutoModelForCausalLM.from_pretrained(again, **given)
torch.testing.assert_close(read(saved), said["logits"])
try:
    import accelerate
except ImportError:
    pass
else:
    blocks = "model.layers"
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", **{f"{blocks}.{i}": "disk" for i in range(3)}}
    given |= {"device_map": places, "offload_folder": offload}
    away = AutoModelForCausalLM.from_pretrained(source, **given)
    torch.testing.assert_close(read(away), said["logits"])
write = pipeline("text-generation", model=source, trust_remote_code=True)
text = write("w3 w5", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
assert text.startswith("w3 w5") and len(text) > 8, text
print("all said")
"""


@pytest.mark.parametrize(
    "kind", ["llama layered", pytest.param("llama factored", marks=pytest.mark.slow)]
)
def test_strangers_have_the_same_habits(opening, folder, tmp_path, kind):
    torch.save({"ids": IDS, "logits": said(opening(kind))}, tmp_path / "said.pt")
    paths = [folder(kind), tmp_path / "again", tmp_path / "disk", tmp_path / "said.pt"]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, paths)],
        cwd=tmp_path,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("all said"), done.stderr[-3000:]


def test_forms_are_seen_by_the_tests_above(opening):
    layers = [m for m in opening("llama factored").modules() if isinstance(m, Factored)]
    assert len(layers) == 6
