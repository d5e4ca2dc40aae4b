"""A client of a Butterfly cluster, with the package `openai` as it is (pip install openai).

    butterfly init && butterfly serve cluster/topology.toml
    python examples/python/client.py "Ownership is"

Every answer says what backs it: the receipt's name, and the nodes that voted for each slice. A stream that ends without an
exception is whole; the answer is proved once the receipt is verified (`butterfly verify`, with the epoch of someone you
trust).
"""

import os
import sys
import uuid

import openai

BASE_URL = os.environ.get("BUTTERFLY_URL", "http://127.0.0.1:8080/v1")
API_KEY = os.environ.get("BUTTERFLY_API_KEY", "none-needed-on-loopback")


def main() -> int:
    prompt = " ".join(sys.argv[1:]) or "Ownership is"
    client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY)
    model = client.models.list().data[0].id

    # Whoever retries under the same key gets the same answer, and nothing is computed twice.
    retry = {"Idempotency-Key": str(uuid.uuid4())}
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0, extra_headers=retry)
    print(f"{prompt}{answer.choices[0].text}")
    proof = answer.butterfly
    print(f"receipt {proof['receipt_id']} is {proof['verification']['status']}", file=sys.stderr)
    for slice_ in proof["replicas"]:
        print(f"  slice {slice_['slice']}: {', '.join(slice_['nodes'])}", file=sys.stderr)

    # The same, as it comes.
    try:
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=32, stream=True, stream_options={"include_usage": True}
        )
        print(prompt, end="")
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.text, end="", flush=True)
            if chunk.usage:
                print(f"\n{chunk.usage.completion_tokens} tokens", file=sys.stderr)
    except openai.APIError as error:
        # Also when the stream breaks off: what came before is no answer then.
        print(f"\nno answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
