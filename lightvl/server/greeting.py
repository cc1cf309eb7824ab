"""What the terminal says once the server answers: the address, and a curl command that works when pasted as it is."""

from __future__ import annotations

import json
import shlex

from lightvl.config import ModelInfo

SAMPLE_URL = "https://raw.githubusercontent.com/sgl-project/sglang/main/assets/logo.png"


def base_url(host: str, port: int) -> str:
    """A URL that a client on this machine can use; listening on every address includes the loopback one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def greeting(info: ModelInfo, host: str, port: int, needs_key: bool) -> str:
    url = base_url(host, port)
    command = curl_command(info, url, needs_key)
    return f"\nLightVL serves {info.served_name} at {url} (OpenAI API: {url}/v1). Try:\n\n{command}\n"


def curl_command(info: ModelInfo, url: str, needs_key: bool) -> str:
    """With the sample image as a data URL that the shell makes, so that the command stays short; with a public https
    image for a model without a sample; with text alone for a model without images."""
    content: list[dict[str, object]] = [{"type": "text", "text": info.sample_question}]
    if not info.takes_images:
        content[0]["text"] = "Say hello in one short sentence."
    elif info.sample_image is None:
        content.insert(0, {"type": "image_url", "image_url": {"url": SAMPLE_URL}})
    else:
        kind = "jpeg" if info.sample_image.lower().endswith((".jpg", ".jpeg")) else "png"
        # `tr`: GNU base64 wraps lines, and a JSON string must not.
        data = f"$(base64 < {shlex.quote(info.sample_image)} | tr -d '\\n')"
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,@DATA@"}})
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 100})
    if info.takes_images and info.sample_image is not None:
        body = body.replace("@DATA@", data)
    header = ' -H "Authorization: Bearer YOUR_API_KEY"' if needs_key else ""
    return f"curl -s {url}/v1/chat/completions{header} -d @- <<END\n{body}\nEND"
