"""Ask a running `tokencomp serve` about an image, at several ratios.

    tokencomp serve --model tiny-qwen2-vl --ratio 0.5 &
    python examples/serve_client.py IMAGE "What color is the circle?"

The script needs the `openai` package. Both engines and all OpenAI-compatible clients work alike.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import os
from pathlib import Path

from openai import OpenAI


def data_url(path: Path) -> str:
    """Return the file as a data: URL, because servers never fetch media by themselves."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="image or video file")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default=os.environ.get("TOKENCOMP_API_KEY", "unused"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key=arguments.key)
    model = client.models.list().data[0].id
    url = data_url(arguments.file)
    kind = "video_url" if url.startswith("data:video") else "image_url"
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": arguments.question}]
    for ratio in arguments.ratios:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=32,
            temperature=0,
            # Both engines read the options here. The hf engine also reads a field "tokencomp".
            extra_body={"mm_processor_kwargs": {"tokencomp": {"ratio": ratio}}},
        )
        text = answer.choices[0].message.content.strip()
        print(f"ratio {ratio}: {answer.usage.prompt_tokens} prompt tokens → {text!r}")


if __name__ == "__main__":
    main()
