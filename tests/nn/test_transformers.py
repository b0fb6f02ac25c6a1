"""The attention implementation "regard" of transformers, in fresh and spawned processes, and after loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import regard

_MODEL = """
import sys
config = transformers.LlamaConfig(
    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8
)
transformers.set_seed(0)
model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="regard").eval()
"""
_ORDERS = {
    "regard first": "import regard, transformers",
    "transformers in use": "import transformers; from transformers import LlamaForCausalLM; import regard",
}


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", _ORDERS)
def test_implementation_is_registered_in_either_order(order: str) -> None:
    code = "import torch; print(model(torch.tensor([[1, 2, 3]])).logits.shape, model.config._attn_implementation)"
    assert _run(f"{_ORDERS[order]}\n{_MODEL}\n{code}").strip() == "torch.Size([1, 3, 9]) regard"


def test_import_of_regard_does_not_import_transformers() -> None:
    assert _run("import regard, sys; print('transformers' in sys.modules)").strip() == "False"


def test_replaced_model_is_loaded_and_spawned_without_importing_regard(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).logits
    regard.nn.replace_attention(model)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    torch.save(expected, tmp_path / "expected.pt")
    _run(f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(torch.tensor([[1, 2, 3, 4]])).logits, expected)
""")
    (tmp_path / "spawn.py").write_text(
        """
import sys
import torch


def run(model, ids, queue):
    queue.put(model(ids).logits.detach().sum().item())


if __name__ == "__main__":
    model = torch.load(sys.argv[1], weights_only=False)
    context = torch.multiprocessing.get_context("spawn")
    queue, ids = context.Queue(), torch.tensor([[1, 2, 3, 4]])
    process = context.Process(target=run, args=(model, ids, queue))
    process.start()
    assert abs(queue.get(timeout=120) - model(ids).logits.sum().item()) < 1e-4
    process.join()
"""
    )
    done = subprocess.run(
        [sys.executable, "spawn.py", "model.pt"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
