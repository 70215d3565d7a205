"""Read checkpoints in processes of their own, by a route: reader.py ROUTE [CONFIG ...].

On the route "stranger" importing secateur fails, so the checkpoints stand on their own files. Each
line of the input names a folder. What opens each of its checkpoints, and what that is asked, is in
the folder's jobs.json and inputs.safetensors. Each folder is read by a process of its own, forked
from this one, which has imported what all of them need of transformers, as the stock models of the
named config classes, and has opened nothing.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

NEW_TOKENS = 4
PROMPTS = (24, 9)  # lengths of the left-padded batch

if __name__ == "__main__" and sys.argv[1] == "stranger":
    sys.modules["secateur"] = None  # type: ignore[assignment]


def main(route: str, configs: list[str]) -> None:
    """Read folder after folder; a line of the output says how the process of each ended."""
    import torch
    import transformers

    torch.set_num_threads(1)
    if route == "secateur":
        import secateur  # noqa: F401
    for auto in ("CausalLM", "MaskedLM", "ImageClassification", "Seq2SeqLM"):
        getattr(transformers, f"AutoModelFor{auto}")
    for config in configs:
        importlib.import_module(
            getattr(transformers, config).__module__.replace(".configuration_", ".modeling_")
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                read_folder(route, Path(line.rstrip("\n")))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def read_folder(route: str, folder: Path) -> None:
    """Read all checkpoints that a folder names."""
    from safetensors.torch import load_file, save_file

    jobs = json.loads((folder / "jobs.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    facts: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for job, request in jobs.items():
        try:
            plain = job.endswith(("/plain", "/full"))
            trust = {"trust_remote_code": True} if route == "stranger" and not plain else {}
            own = {k[len(job) + 1 :]: v for k, v in given.items() if k.startswith(job + ":")}
            facts[job], said = read(
                request["folder"], request["auto"], own, trust, folder / "again"
            )
            tensors |= {f"{job}:{key}": value.contiguous() for key, value in said.items()}
        except Exception:
            facts[job] = {"error": traceback.format_exc()}
    (folder / "facts.json").write_text(json.dumps(facts))
    save_file(tensors, folder / "tensors.safetensors")


def read(source: str, auto: str, asked: dict[str, Any], trust: dict[str, bool], again: Path) -> Any:
    import torch
    import transformers

    opener = getattr(transformers, auto)
    writes = auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    inputs = {key: value for key, value in asked.items() if key != "labels"}
    plain = {"use_cache": False} if writes else {}
    said: dict[str, torch.Tensor] = {}
    model, info = opener.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, **trust
    )
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }
    with torch.inference_mode():
        for kind in ("eager", "sdpa"):
            attend_by(model, kind if model._supports_sdpa else "eager")
            said[f"logits.{kind}"] = model(**inputs, **plain).logits[0]
            if writes:
                made = written(model, inputs["input_ids"])
                said |= {f"{key}.{kind}": value for key, value in made.items()}
        if writes:
            said["alone"] = alone(model, inputs["input_ids"])
        attend_by(model, "eager")
        out = model(**inputs, **plain, output_attentions=True)
        names = ("attentions", "encoder_attentions", "decoder_attentions")
        maps = [one for name in names for one in out.get(name) or ()]
        said |= {f"attentions.{i}": a[0] for i, a in enumerate(maps)}
        if writes:
            cache = model(**inputs, use_cache=True).past_key_values
            layers = getattr(cache, "self_attention_cache", cache).layers
            facts["cache"] = sum(layer.keys.numel() + layer.values.numel() for layer in layers)

        base = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **trust)
        said["states"] = base(**inputs).last_hidden_state[0]
        said["states.expected"] = states(model, inputs)[0]

        half = opener.from_pretrained(source, dtype=torch.bfloat16, **trust)
        said["logits.bfloat16"] = half(**inputs, **plain).logits[0].float()

        model.save_pretrained(again)
        saved = opener.from_pretrained(again, dtype=torch.float32, **trust)
        said["logits.again"] = saved(**inputs, **plain).logits[0]
    if hasattr(model, "hf_quantizer"):  # unpacked in the first pass, which was one of inference
        model = opener.from_pretrained(source, dtype=torch.float32, **trust)
    model.train()
    model(**asked).loss.backward()
    facts["without_gradient"] = [
        name
        for name, p in model.named_parameters()
        if p.numel() and p.requires_grad and (p.grad is None or not bool(p.grad.isfinite().all()))
    ]
    return facts, said


def attend_by(model: Any, kind: str) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation(kind)
    else:  # too old a class (Falcon's)
        model.config._attn_implementation = kind


def generated(model: Any, batch: Any, mask: Any, cached: bool) -> Any:
    out = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=cached,
        pad_token_id=0,
    )
    return out[:, 1 if model.config.is_encoder_decoder else batch.shape[1] :]


def states(model: Any, inputs: dict[str, Any]) -> Any:
    """What the body of a model says, also where it is no module of its own (T5's)."""
    if model.base_model is not model:
        return model.base_model(**inputs).last_hidden_state
    read = model.encoder(input_ids=inputs["input_ids"]).last_hidden_state
    written = model.decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=read)
    return written.last_hidden_state


def written(model: Any, ids: Any) -> dict[str, Any]:
    """What a model that writes goes on with, with and without a cache and left-padded."""
    longest, whole = max(PROMPTS), ids.new_ones(ids.shape)
    batch, mask = ids.new_zeros(2, len(PROMPTS), longest)
    for i, length in enumerate(PROMPTS):
        batch[i, longest - length :] = ids[0, :length]
        mask[i, longest - length :] = 1
    return {
        "cached": generated(model, ids, whole, True)[0],
        "uncached": generated(model, ids, whole, False)[0],
        "padded": generated(model, batch, mask, True),
    }


def alone(model: Any, ids: Any) -> Any:
    """The same for every prompt of the batch by itself."""
    import torch

    cut = (ids[:, :length] for length in PROMPTS)
    return torch.cat([generated(model, one, one.new_ones(one.shape), True) for one in cut])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
