"""The whole SFT path against the same loop written with torch and transformers: data, loss, gradient, optimizer, export."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import final_params

import jaxreason.hf
import jaxreason.model
from jaxreason import cli
from jaxreason.data import embedded
from jaxreason.data.tokenizer import load

STEPS, BATCH, RATE = 20, 4, 2e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama with the embedded tokenizer, as transformers writes it."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, initializer_range=0.08, rms_norm_eps=1e-5,
        max_position_embeddings=131072, bos_token_id=344, eos_token_id=[345, 349],
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    load("embedded").save(path)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    rows = [
        [{"role": "user", "content": e.user}, {"role": "assistant", "content": e.reply}]
        for e in embedded.examples("arithmetic", "train", STEPS * BATCH, 0)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return path, rows


@pytest.fixture(scope="module")
def run(checkpoint, conversations, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    words = [
        f"model.weights={checkpoint}", "model.preset=null", f"data.source={conversations[0]}", "data.packing=false",
        "data.shuffle=false", f"data.batch_size={BATCH}", "train.microbatch_size=null", "data.workers=0", "mesh.data=1",
        f"data.cache_dir={root / 'cache'}", f"run.dir={root}", f"train.steps={STEPS}", f"optimizer.learning_rate={RATE}",
        "optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.weight_decay=0", "eval.problems=0",
        "data.eval_rows=0", "train.save_every=0", "optimizer.max_grad_norm=1.0", "mesh.fsdp=4", "mesh.tensor=2",
    ]  # fmt: skip
    assert cli.train(["--config", "sft", *words]) == 0
    return root / "sft"


def torch_losses(checkpoint, rows):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        total, batch = 0, []
        for messages in rows[step * BATCH : (step + 1) * BATCH]:
            render = lambda m, **k: tokenizer.apply_chat_template(m, tokenize=False, **k)  # noqa: E731
            ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
            prompt = ids(render(messages[:1], add_generation_prompt=True))
            whole = ids(render(messages))
            assert whole[: len(prompt)] == prompt
            batch.append((torch.tensor([whole]), len(prompt)))
            total += len(whole) - len(prompt)
        optimizer.zero_grad()
        loss = 0.0
        for ids, start in batch:  # one sequence at a time, so that nothing is padded
            log_p = model(ids).logits[0].log_softmax(-1)
            loss = loss - log_p[start - 1 : -1].gather(1, ids[0, start:, None]).sum() / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def test_twenty_steps_follow_torch_on_a_sharded_mesh(checkpoint, conversations, run):
    ours = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    theirs, _ = torch_losses(checkpoint, conversations[1])
    assert theirs[-1] < theirs[0] - 0.5  # it learns, so that agreement means something
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_the_export_is_what_transformers_says_it_is(run, tmp_path, capsys):
    out = tmp_path / "hf"
    assert cli.convert(["to-hf", str(run), str(out)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = np.random.default_rng(0).integers(0, 340, (1, 2048))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    params, config = jaxreason.hf.load(out)
    ours = np.asarray(jaxreason.model.logits(params, config, ids))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    # the text of generate.py is transformers' greedy text
    question = "Compute 37 + 48 - 19."
    capsys.readouterr()
    words = ["max_completion_tokens=40", "temperature=0"]
    assert cli.generate(["--model", str(run), "--prompt", question, *words]) == 0
    printed = capsys.readouterr().out
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    stops = set(model.generation_config.eos_token_id)
    text = tokenizer.decode([t for t in answer.tolist() if t not in stops], skip_special_tokens=False)
    assert printed == text + "\n"
    # and back: bitwise
    assert cli.convert(["from-hf", str(out), str(tmp_path / "back")]) == 0
    import jax

    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "back"), final_params(run))
