"""llama.cpp reads our GGUF files as we mean them: the same probabilities, the same answer, the same tokens of a text."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets.fetch_tokenizers import fetch_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from unit.data.test_tokenizer import awkward_texts
from unit.samples import DEBUG_TOKENIZER, tiny_config

from tunelib.data.chat import ChatTemplate
from tunelib.data.tokenizer import Tokenizer
from tunelib.formats.gguf import plan_gguf, write_gguf
from tunelib.formats.gguf_words import PRE_TOKENIZERS
from tunelib.infer.generate import generate_greedy
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder
from tunelib.model.families import parse_config

TOP = 20
CPU = torch.device("cpu")
# Runs in a process of its own: the library prints, and ends the process where a file is wrong. Attention and its cache are float32
# (the library's own choice is float16), a prompt is computed whole, not taken from the one before, and there is one thread: several
# wait for each other in loops, and are slow where others compute too.
PROGRAM = """
import json, sys, urllib.request
import xllamacpp

path, asked, answers = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.fit_params = 2048, 1, 0, False, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)

def tokenize(request):
    body = urllib.request.Request(server.listening_address + "/tokenize", json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(body, timeout=60) as answer:
        return json.load(answer)["tokens"]

asked = json.load(open(asked))
answered = {
    "completions": [
        (server.handle_chat_completions if "messages" in request else server.handle_completions)({"temperature": 0, "cache_prompt": False, **request})
        for request in asked["completions"]
    ],
    "tokens": [tokenize(request) for request in asked["texts"]],
}
json.dump(answered, open(answers, "w"))
"""


def ask(path: Path, completions: Sequence[dict[str, Any]] = (), texts: Sequence[dict[str, Any]] = (), timeout: int = 120) -> dict[str, Any]:
    """What llama.cpp answers to requests of its server, with the model at ``path``."""
    asked, answers = path.with_suffix(".asked"), path.with_suffix(".answers")
    asked.write_text(json.dumps({"completions": list(completions), "texts": list(texts)}))
    answers.unlink(missing_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(path), str(asked), str(answers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False)
    assert answers.is_file(), done.stdout.decode(errors="replace")[-6000:]
    return json.loads(answers.read_text())


def log_probs_of(path: Path, prompt: list[int], num_tokens: int = 1) -> list[tuple[int, dict[int, float]]]:
    """The tokens that llama.cpp chooses after a prompt, each with the log-probabilities of the TOP first."""
    (answer,) = ask(path, [{"prompt": prompt, "n_predict": num_tokens, "n_probs": TOP}])["completions"]
    rows = answer["choices"][0]["logprobs"]["content"]
    return [(row["id"], {entry["id"]: entry["logprob"] for entry in row["top_logprobs"]}) for row in rows]


def distance(theirs: dict[int, float], ours: Tensor) -> float:
    """The largest difference between log-probabilities of llama.cpp's first TOP tokens."""
    assert len(theirs) == TOP
    return max(abs(value - ours[number].item()) for number, value in theirs.items())


def our_log_probs(model: Decoder, ids: list[int]) -> Tensor:
    """Log-probabilities after every token, (S, V)."""
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.arange(len(ids))[None], (len(ids),))[0].float().log_softmax(-1)


def write_model(path: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, kind: str = "float32") -> Path:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write_gguf(plan_gguf(config, shapes, tokenizer, tokenizer.chat_template, kind, "a model"), path, lambda name, where: weights[name])
    return path


def draw_model(config: ModelConfig) -> Decoder:
    """A model whose every weight, norms and biases too, is random and large enough that places and layers matter."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 / math.sqrt(parameter.shape[1]) if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + name.endswith("norm.weight"))
    return model


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 648, "max_position_embeddings": 512, "head_dim": 16}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 scaling": {"rope_scaling": SCALING},
}
PROMPT = [(7 * place * place + 3 * place) % 636 + 4 for place in range(300)]


@pytest.mark.parametrize("model", MODELS)
def test_probabilities_are_those_of_our_model(tmp_path: Path, model: str) -> None:
    ours = draw_model(tiny_config(**{**WIDE, **MODELS[model]}))
    path = write_model(tmp_path / "model.gguf", ours.config, dict(ours.named_parameters()), Tokenizer(DEBUG_TOKENIZER))
    ((_, theirs),) = log_probs_of(path, PROMPT)
    expected = our_log_probs(ours, PROMPT)[-1]
    assert distance(theirs, expected) < 5e-5  # float32 sums in another order: 5e-6 seen
    if model == "llama3 scaling":  # the scaling matters at this length
        ours.config = ours.model.config = replace(ours.config, rope_scaling=None)
        assert distance(theirs, our_log_probs(ours, PROMPT)[-1]) > 0.05


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("float16", 0.005),  # 11 bits of every weight, and of what it is multiplied with: 0.0016 seen
        ("bfloat16", 0.03),  # 8 bits: 0.010 seen
        ("q8_0", 0.1),  # whole numbers of 8 bits with one scale for 32, both weights and what they are multiplied with: 0.037 seen
    ],
)
def test_probabilities_of_smaller_types_are_near(tmp_path: Path, kind: str, tolerance: float) -> None:
    ours = draw_model(tiny_config(**WIDE))
    path = write_model(tmp_path / "model.gguf", ours.config, dict(ours.named_parameters()), Tokenizer(DEBUG_TOKENIZER), kind)
    ((_, theirs),) = log_probs_of(path, PROMPT)
    assert distance(theirs, our_log_probs(ours, PROMPT)[-1]) < tolerance


@pytest.fixture(scope="module")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The real SmolLM2-135M-Instruct as a GGUF file of float32."""
    config = parse_config(json.loads((smollm2 / "config.json").read_text()), "config.json")
    weights = load_file(smollm2 / "model.safetensors")
    return write_model(tmp_path_factory.mktemp("smollm2") / "model.gguf", config, weights, Tokenizer(smollm2))


def test_smollm2_answers_as_it_does_here(smollm2: Path, smollm2_file: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    model = Decoder(parse_config(json.loads((smollm2 / "config.json").read_text()), "config.json"))
    model.load_state_dict(load_file(smollm2 / "model.safetensors"), strict=False)  # the tied head is not stored
    text = "<|im_start|>user\nName three colours of the rainbow and say where each is found.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    rows = log_probs_of(smollm2_file, prompt, num_tokens=24)
    answer = generate_greedy(model, prompt, 24, tokenizer.stop_ids, CPU)
    assert len(answer) > 8
    assert [number for number, _ in rows] == [*answer, tokenizer.id_of("<|im_end|>")]
    expected = our_log_probs(model, prompt + answer)[len(prompt) - 1 :]
    differences = [distance(theirs, ours) for (_, theirs), ours in zip(rows, expected, strict=True)]
    assert max(differences) < 1e-3, differences  # float32 sums in another order, 30 layers deep: 1.7e-4 seen


def test_chat_template_makes_the_same_prompt(smollm2: Path, smollm2_file: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    assert tokenizer.chat_template is not None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ChatTemplate(tokenizer, "its own", tokenizer.chat_template).encode_prompt(messages)
    plain, chat = ask(smollm2_file, [{"prompt": prompt, "n_predict": 12}, {"messages": messages, "n_predict": 12}])["completions"]
    assert chat["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] == len(prompt)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def find_differences(folder: Path, path: Path, texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """Texts that become other tokens in llama.cpp, with its ids and ours: once with special tokens parsed and bos put before, once plain."""
    tokenizer = Tokenizer(folder)
    rows = -(-tokenizer.vocab_size // 8) * 8
    ours = draw_model(tiny_config(vocab_size=rows, num_hidden_layers=1, tie_word_embeddings=True))
    write_model(path, ours.config, dict(ours.named_parameters()), tokenizer)
    requests: list[dict[str, Any]] = [{"content": text, "add_special": parse, "parse_special": parse} for text in texts for parse in (True, False)]
    found = ask(path, texts=requests)["tokens"]
    expected = [
        tokenizer.encode(request["content"], add_special_tokens=request["add_special"], special=None if request["parse_special"] else ()).ids
        for request in requests
    ]
    return [(request["content"], theirs, ours) for request, theirs, ours in zip(requests, found, expected, strict=True) if theirs != ours]


@pytest.mark.parametrize("name", ["smollm2", "debug", "qwen2", pytest.param("llama3", marks=pytest.mark.slow), "mistral-v1"])
def test_texts_become_the_same_tokens(tmp_path: Path, smollm2: Path, name: str) -> None:
    if name == "qwen2":  # the published way to split a text, with another's vocabulary
        folder = tmp_path / "qwen2"
        shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        content = json.loads((folder / "tokenizer.json").read_text())
        steps = [{**step, "trim_offsets": False} for step in PRE_TOKENIZERS["qwen2"][0]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        folder = {"smollm2": smollm2, "debug": DEBUG_TOKENIZER}.get(name) or fetch_tokenizer(name)
    assert find_differences(folder, tmp_path / "model.gguf", awkward_texts(250)) == []
