"""``--for`` and ``export --to gguf`` at the command line."""

import json
from importlib.util import find_spec

import pytest
import transformers
import yaml
from conftest import ALLOCATORS, ROOT, save_checkpoint

TRAINED = ROOT.parent / "shared" / "data" / "models"
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="the library gguf is not installed"
)
runs = pytest.mark.skipif(
    find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: pip install 'secateur[gguf]'",
)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_plan_has_sizes_of_the_runtime(plan, allocator):
    method = "flap" if allocator == "fluctuation" else "modegpt"
    content = plan("--for", "gguf", "--keep", "0.8", "--allocator", allocator, "--method", method)
    assert content["asked"]["runtime"] == "gguf"
    for row in content["units"]:
        assert row["after"] == row["before"] or (row["kind"] == "mlp" and row["after"] == 32)
    assert any(row["after"] != row["before"] for row in content["units"])


def test_a_plan_is_replayed_for_its_runtime_and_edits_are_held_to_it(
    plan, replay, run, model, room
):
    content = plan("--for", "gguf", "--keep", "0.8", "--method", "modegpt")
    report = replay(content)
    assert report["budget"]["reached"] == content["budget"]["reached"]
    row = next(row for row in content["units"] if row["kind"] == "mlp")
    row["after"] = 40
    (room / "edited.json").write_text(json.dumps(content))
    edited = run("compress", model, room / "again", "--plan", room / "edited.json")
    edited.refused("size 40 is not allowed for gguf", "nearest is 32")


@pytest.mark.parametrize("flag", ["--for", "--target"])
def test_a_recipe_records_the_runtime(compress, room, flag):
    compress(flag, "gguf", "--keep", "0.8", "--method", "modegpt").succeeded()
    recipe = yaml.safe_load((room / "out" / "secateur" / "recipe.yaml").read_text())
    assert recipe["steps"][0]["runtime"] == "gguf"


def test_flags_are_refused_where_they_mean_nothing(run, compress, model, room):
    compress("--target", "gguf", "--for", "vllm").refused("--target gguf", "--for vllm")
    compress("--for", "gugf").refused("gugf", "gguf")
    compress("--for", "gguf", "--method", "svd").refused("svd", "--type q4_k_m")
    run("export", model, room / "m.gguf", "--to", "ggml").refused("ggml", "gguf")
    run("export", model, room / "m.gguf").refused("--to gguf", "--dense")
    both = ("--to", "gguf", "--dense")
    run("export", model, room / "m.gguf", *both).refused("--to gguf", "--dense")
    run("export", model, room / "m", "--dense", "--type", "f16").refused("--type", "--to gguf")
    (room / "plan.json").write_text("{}")
    given = ("--plan", room / "plan.json", "--for", "gguf")
    run("compress", model, room / "o", *given).refused("--for", "--plan")


@needs_gguf
def test_unchecked_is_said_and_the_file_is_there(run, model, room):
    shown = run("export", model, room / "m.gguf", "--to", "gguf", "--unchecked").succeeded()
    assert "WARNING" in shown.err
    assert "not checked" in shown.out
    assert [path.name for path in room.iterdir()] == ["m.gguf"]
    again = run("export", model, room / "m.gguf", "--to", "gguf", "--unchecked")
    again.refused("exists", "--overwrite")


@needs_gguf
@runs
def test_a_compressed_checkpoint_runs_in_llama_cpp_with_its_tokenizer(run, compress, room):
    compress("--keep", "0.8", "--method", "modegpt").succeeded()
    given = (room / "out", room / "m.gguf", "--to", "gguf")
    made = json.loads(run("export", *given, "--json").succeeded().out)
    assert made["architecture"] == "deci"
    assert made["finding"]["same"] == made["finding"]["greedy"] == 16
    assert made["finding"]["largest"] < 1e-4
    shown = run("export", *given, "--overwrite", "--type", "q4_k_m").succeeded()
    assert "16" in shown.out


@needs_gguf
@runs
@pytest.mark.parametrize(("kind", "found"), [("Qwen2", "deci"), ("Qwen3", "openelm")])
def test_other_families_run_with_sizes_by_layer(
    run, compress, room, llama_config, tokenizer, tmp_path, kind, found
):
    fields = llama_config(vocab_size=384, tie_word_embeddings=True).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    config = getattr(transformers, f"{kind}Config")(**fields)
    dense = save_checkpoint(tmp_path / kind, config, tokenizer)
    compress("--keep", "0.8", "--method", "modegpt", source=dense).succeeded()
    plan = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    assert len({row["after"] for row in plan["units"] if row["kind"] == "mlp"}) > 1
    given = (room / "out", room / "m.gguf", "--to", "gguf")
    made = json.loads(run("export", *given, "--json").succeeded().out)
    assert made["architecture"] == found
    assert made["finding"]["same"] == made["finding"]["greedy"] == 16


@needs_gguf
@runs
def test_low_rank_pairs_are_multiplied_out(run, compress, room):
    compress("--method", "svd-llm", "--rank-step", "2", "--keep", "0.8").succeeded()
    given = (room / "out", room / "m.gguf", "--to", "gguf")
    made = json.loads(run("export", *given, "--json").succeeded().out)
    assert made["architecture"] == "llama"
    assert made["finding"]["same"] == 16


@needs_gguf
@runs
@pytest.mark.skipif(not TRAINED.is_dir(), reason="no trained models beside the project")
@pytest.mark.parametrize(("name", "kind"), [("stories260K", "f32"), ("reference-7m", "q8_0")])
def test_trained_models_and_their_tokenizers_are_the_same_in_llama_cpp(run, room, name, kind):
    given = (TRAINED / name, room / "m.gguf", "--to", "gguf", "--type", kind)
    made = json.loads(run("export", *given, "--json").succeeded().out)
    assert made["finding"]["same"] >= 15
