"""Asks the student one question through the front door, as a user's program would.

python ask_front_door.py SERVING_DIRECTORY OUTPUT_FILE QUESTION [--no-tools]
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.serving.endpoints import read_endpoints


def main() -> None:
    """Write the assistant's message as JSON."""
    directory, output, question = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    body: dict[str, Any] = {
        "model": "student",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
    }
    if "--no-tools" not in sys.argv:
        body["tools"] = [TOOL]
    request = urllib.request.Request(
        f"{read_endpoints(directory).front_door}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        output.write_text(json.dumps(json.load(response)["choices"][0]["message"]))


if __name__ == "__main__":
    main()
