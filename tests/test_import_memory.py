"""Host memory while weights that are split over eight devices are imported and exported: a shard at a time.

The checkpoint has the shape of an 8B Llama (32 layers, grouped heads, untied head, files that layers share), scaled down
to 240 MiB: an eighth of the widths and of the vocabulary. A CPU device's memory is the host's, so the shards that are
kept count too, and what is measured is what stands beside them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
D, F, L, V, N, K, H = 512, 1792, 32, 16_000, 8, 2, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": L, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H, "vocab_size": V,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYER = {
    "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
    "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}  # fmt: skip

MEASURE = '''
import json, sys
from pathlib import Path
import jax
from jaxreason import config as cfg
from jaxreason import hf
from jaxreason.hf import read
from jaxreason.sharding import make_mesh
from jaxreason.weights import WeightSource

whole, small, out = map(Path, sys.argv[1:])
mesh = make_mesh(cfg.Mesh())
read._MAPPED_BYTES //= 32  # scaled down as the tables are

def load(path):
    source = WeightSource("hf", path)
    config = source.config("bfloat16", "bfloat16")
    return source.params(config, mesh), config

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])

def begin():
    # getrusage's peak begins with that of the process that started this one; this one can begin anew.
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")

hf.save(*load(small), out / "small")  # what is imported, traced and compiled once
before = begin()
params, config = load(whole)
imported = status("VmHWM") - before
shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
before = begin()
hf.save(params, config, out / "whole", shard_bytes=2**27)
print(json.dumps({"imported": imported, "exported": status("VmHWM") - before, "kept": sum(shards), "shard": max(shards)}))
'''


def write(directory: Path, layers: int) -> dict[str, np.ndarray]:
    """Random bfloat16 weights (finite) in four files; returns them."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    bits = {f"{name}.weight": rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF for name, shape in shapes.items()}
    tensors = {name: values.astype(np.uint16).view(ml_dtypes.bfloat16) for name, values in bits.items()}
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate(np.array_split(names, 4)):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("import")
    tensors = write(root / "whole", L)
    write(root / "small", 1)
    # Freed memory goes back at once, so that the peak is what is held and not what the allocator keeps for later.
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "MALLOC_MMAP_THRESHOLD_": "262144",
    }  # fmt: skip
    command = [sys.executable, "-c", MEASURE, *(str(root / name) for name in ("whole", "small", "out"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), tensors, root / "out" / "whole"


def test_importing_holds_one_shard_beside_those_that_are_kept(measured):
    """Measured: 0.5 of the largest shard. With a parameter's shards for all devices made at once it is 8.5."""
    found, tensors, _ = measured
    assert found["kept"] >= sum(values.nbytes for values in tensors.values()) > 230 * 2**20
    assert found["shard"] == L * D * F * 2 // 8  # of the mlp's kernels, all layers
    assert found["imported"] < found["kept"] + 1.3 * found["shard"]


def test_exporting_holds_a_tensor_at_a_time(measured):
    """Measured: 54 MiB, of which the two tables are 31, since jax keeps their gathered values; 150 a file at a time."""
    found, tensors, directory = measured
    table = tensors["lm_head.weight"].nbytes
    assert found["exported"] < 2 * table + 2**27 / 2
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        for name, values in load_file(file).items():
            np.testing.assert_array_equal(values.view(np.uint16), tensors.pop(name).view(np.uint16), err_msg=name)
    assert not tensors
