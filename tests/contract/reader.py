"""Read checkpoints in a process of its own and note what they say: reader.py ROUTE FOLDER.

On the route "stranger" importing secateur fails, so the checkpoints stand on their own files.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

NEW_TOKENS = 4
PROMPTS = (24, 9)  # lengths of the left-padded batch

if __name__ == "__main__" and sys.argv[1] == "stranger":
    sys.modules["secateur"] = None  # type: ignore[assignment]


def main(route: str, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    if route == "secateur":
        import secateur  # noqa: F401
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    jobs = json.loads((folder / "jobs.json").read_text())
    facts: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for job, request in jobs.items():
        try:
            plain = job.endswith(("/plain", "/full"))
            trust = {"trust_remote_code": True} if route == "stranger" and not plain else {}
            facts[job], said = read(request["folder"], request["ids"], trust, folder / "again")
            tensors |= {f"{job}:{key}": value.contiguous() for key, value in said.items()}
        except Exception:
            facts[job] = {"error": traceback.format_exc()}
    (folder / "facts.json").write_text(json.dumps(facts))
    save_file(tensors, folder / "tensors.safetensors")


def read(source: str, ids: list[int], trust: dict[str, bool], again: Path) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    prompt = torch.tensor([ids])
    said: dict[str, torch.Tensor] = {}
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, **trust
    )
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }

    def generated(batch: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
        out = model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
        )
        return out[:, batch.shape[1] :]

    with torch.inference_mode():
        for kind in ("eager", "sdpa"):
            model.config._attn_implementation = kind if model._supports_sdpa else "eager"
            out = model(input_ids=prompt, use_cache=False)
            said[f"logits.{kind}"] = out.logits[0]
            for cached in (True, False):
                key = f"greedy.{kind}.{'cached' if cached else 'uncached'}"
                said[key] = generated(prompt, torch.ones_like(prompt), cached)[0]
            longest = max(PROMPTS)
            batch = torch.zeros(len(PROMPTS), longest, dtype=torch.int64)
            mask = torch.zeros_like(batch)
            for i, length in enumerate(PROMPTS):
                batch[i, longest - length :] = prompt[0, :length]
                mask[i, longest - length :] = 1
            said[f"padded.{kind}"] = generated(batch, mask, True)
        alone = [generated(prompt[:, :n], torch.ones(1, n).long(), True) for n in PROMPTS]
        said["alone"] = torch.cat(alone)
        model.config._attn_implementation = "eager"
        maps = model(input_ids=prompt, use_cache=False, output_attentions=True).attentions
        said |= {f"attentions.{i}": a[0] for i, a in enumerate(maps)}
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        facts["cache"] = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)

        base = AutoModel.from_pretrained(source, dtype=torch.float32, **trust)
        said["states"] = base(input_ids=prompt).last_hidden_state[0]
        said["states.expected"] = model.base_model(input_ids=prompt).last_hidden_state[0]

        half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **trust)
        said["logits.bfloat16"] = half(input_ids=prompt, use_cache=False).logits[0].float()

        model.save_pretrained(again)
        saved = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, **trust)
        said["logits.again"] = saved(input_ids=prompt, use_cache=False).logits[0]
    model.train()
    model(input_ids=prompt, labels=prompt).loss.backward()
    facts["without_gradient"] = [
        name
        for name, p in model.named_parameters()
        if p.numel() and p.requires_grad and (p.grad is None or not bool(p.grad.isfinite().all()))
    ]
    return facts, said


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
