"""Requests that nobody wrote: schemathesis makes them from the OpenAPI document of a running cluster, valid ones and others.

    python .ci/generated.py target/release/butterfly 10000

No answer may be a 5xx, have a status or a form that the document does not name, or take the server down. One exception: 504
is what a request asks for whose `deadline_ms` is short.

A run in which every answer was right, but the generator gave up on an operation (it has a budget of time, which a busy
machine uses up), is followed by another one, a few times.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request

from cluster import Cluster

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance"
)
# Runs that may end because the generator gave up.
GIVEN_UP_MAX = 3
SETTINGS = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def operations(url: str) -> int:
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        return sum(len(methods) for methods in json.load(answer)["paths"].values())


def main() -> int:
    binary, wanted = sys.argv[1], int(sys.argv[2])
    generated, seed, given_up = 0, 1, 0
    with Cluster(binary, keyed=False) as cluster, tempfile.TemporaryDirectory() as folder:
        settings = pathlib.Path(folder) / "schemathesis.toml"
        settings.write_text(SETTINGS)
        each = max(1, wanted // operations(cluster.url))
        while generated < wanted:
            run = subprocess.run(
                [
                    *(sys.executable, "-m", "schemathesis.cli", f"--config-file={settings}", "run"),
                    *(f"{cluster.url}/openapi.json", "--checks", CHECKS, "--phases", "coverage,fuzzing"),
                    *("--max-examples", str(each), "--seed", str(seed), "--workers", "1", "--no-color"),
                    *("--request-timeout", "60", "--generation-database", "none", "--warnings", "off"),
                    *("--suppress-health-check", "all", "--continue-on-failure"),
                ],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            count = re.search(r"(\d+) generated", run.stdout)
            if run.returncode != 0 or not count:
                given_up += 1
                gave_up = count and "= ERRORS =" in run.stdout and "= FAILURES =" not in run.stdout
                if not gave_up or given_up > GIVEN_UP_MAX:
                    print(run.stdout)
                    return 1
                print("the generator gave up on an operation; once more with another seed")
            if cluster.process.poll() is not None:
                print(f"the cluster ended:\n{cluster.output()}")
                return 1
            generated += int(count[1])
            seed += 1
    print(f"{generated} generated requests; every answer is one that the document names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
