"""What the common Python clients make of a running cluster: answers, streams, errors, retries, and a server that dies.

    python .ci/clients.py target/release/butterfly

The clients are the published packages, unchanged. A client that gets half an answer must raise; it must never take it for a
whole one.
"""

import os
import pathlib
import subprocess
import sys
import unittest
import uuid
from concurrent.futures import ThreadPoolExecutor

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LANGCHAIN_TRACING_V2"] = "false"

import warnings

warnings.filterwarnings("ignore", module="pydantic")

import httpx
import langchain_openai
import litellm
import openai

from cluster import KEY, Cluster

litellm.suppress_debug_info = True

BINARY = sys.argv.pop(1) if len(sys.argv) > 1 else "target/release/butterfly"
MODEL = "tiny-rust"
PROMPT = "The borrow checker"


def client(cluster: Cluster, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", **{"api_key": KEY, "max_retries": 0, **options})


class OpenAi(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster(BINARY))
        cls.client = client(cls.cluster)

    def test_models(self):
        models = self.client.models.list().data
        self.assertEqual([model.id for model in models], [MODEL])
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)

    def test_completion(self):
        answer = self.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
        self.assertTrue(answer.choices[0].text)
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertEqual(answer.butterfly["verification"]["status"], "certified")

    def test_stream_with_usage_says_what_the_whole_answer_says(self):
        ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        whole = self.client.completions.create(**ask)
        chunks = list(self.client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        self.assertGreater(len(chunks), 2)
        self.assertEqual("".join(c.choices[0].text for c in chunks if c.choices), whole.choices[0].text)
        self.assertEqual(chunks[-1].usage, whole.usage)
        self.assertEqual(chunks[-2].choices[0].finish_reason, whole.choices[0].finish_reason)

    def test_a_prompt_is_scored_as_harnesses_ask_for_it(self):
        ask = {"model": MODEL, "temperature": 0, "logprobs": 1}
        answer = self.client.completions.create(prompt=PROMPT, max_tokens=4, echo=True, **ask).choices[0]
        self.assertTrue(answer.text.startswith(PROMPT))
        self.assertIsNone(answer.logprobs.token_logprobs[0])
        scored = self.client.completions.create(prompt=answer.text, max_tokens=0, echo=True, **ask)
        self.assertEqual(scored.choices[0].text, answer.text)
        self.assertEqual(scored.usage.completion_tokens, 0)
        self.assertTrue(all(logprob <= 0 for logprob in scored.choices[0].logprobs.token_logprobs[1:]))

    def test_the_example_runs(self):
        example = pathlib.Path(__file__).parent.parent / "examples/python/client.py"
        environment = {**os.environ, "BUTTERFLY_URL": f"{self.cluster.url}/v1", "BUTTERFLY_API_KEY": KEY}
        ran = subprocess.run([sys.executable, example, PROMPT], env=environment, capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        self.assertIn("certified", ran.stderr)

    def test_errors_are_of_their_class(self):
        with self.assertRaises(openai.AuthenticationError) as caught:
            client(self.cluster, api_key="nobody").models.list()
        self.assertEqual(caught.exception.code, "invalid_api_key")
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.completions.create(model="gpt-4", prompt=PROMPT)
        self.assertEqual(caught.exception.code, "model_not_found")
        for wrong, param in (({"temperature": 3}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"suffix": "x"}, "suffix")):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.client.completions.create(model=MODEL, prompt=PROMPT, **wrong)
            self.assertEqual(caught.exception.param, param)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1 << 20)
        self.assertEqual(caught.exception.code, "context_length_exceeded")
        self.assertTrue(caught.exception.request_id)

    def test_a_retry_under_the_same_key_is_the_same_answer(self):
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        ask = lambda: self.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, extra_headers=headers)
        one, two = ask(), ask()
        self.assertEqual((one.id, one.choices[0].text), (two.id, two.choices[0].text))
        with self.assertRaises(openai.UnprocessableEntityError):
            self.client.completions.create(model=MODEL, prompt="Another", max_tokens=8, extra_headers=headers)


class Chat(unittest.TestCase):
    """The same in the form of chats, which is what most clients speak."""

    MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is ownership?"}]

    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster(BINARY))
        cls.client = client(cls.cluster)

    def test_openai(self):
        ask = {"model": MODEL, "messages": self.MESSAGES, "max_tokens": 24, "temperature": 0}
        whole = self.client.chat.completions.create(**ask)
        self.assertEqual(whole.choices[0].message.role, "assistant")
        self.assertEqual(whole.butterfly["verification"]["status"], "certified")
        chunks = list(self.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[-1].usage, whole.usage)
        both = self.client.chat.completions.create(**{**ask, "temperature": 1, "n": 2})
        self.assertEqual([choice.index for choice in both.choices], [0, 1])
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(**ask, tools=[{"type": "function", "function": {"name": "f"}}])
        self.assertEqual((caught.exception.code, caught.exception.param), ("unsupported_parameter", "tools"))

    def test_litellm(self):
        ask = {
            "model": f"openai/{MODEL}",
            "api_base": f"{self.cluster.url}/v1",
            "api_key": KEY,
            "messages": self.MESSAGES,
            "max_tokens": 24,
            "temperature": 0,
            "max_retries": 0,
        }
        whole = litellm.completion(**ask)
        self.assertGreater(whole.usage.completion_tokens, 0)
        chunks = list(litellm.completion(**ask, stream=True))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, whole.choices[0].message.content)

    def test_langchain(self):
        model = langchain_openai.ChatOpenAI(
            model=MODEL,
            base_url=f"{self.cluster.url}/v1",
            api_key=KEY,
            max_retries=0,
            max_tokens=24,
            temperature=0,
            stream_usage=True,
        )
        whole = model.invoke("What is ownership?")
        self.assertGreater(whole.usage_metadata["output_tokens"], 0)
        chunks = list(model.stream("What is ownership?"))
        self.assertEqual("".join(chunk.content for chunk in chunks), whole.content)
        self.assertTrue(any(chunk.usage_metadata for chunk in chunks))


@unittest.skipUnless(os.environ.get("BUTTERFLY_MINILM"), "BUTTERFLY_MINILM names no folder with a pretrained encoder")
class Embeddings(unittest.TestCase):
    TEXTS = ["A cat sat on the mat.", "Ownership moves a value.", "A cat sat on the mat."]

    @classmethod
    def setUpClass(cls):
        init = ("--model", str(pathlib.Path(os.environ["BUTTERFLY_MINILM"]).resolve()))
        cls.cluster = cls.enterClassContext(Cluster(BINARY, init=init))
        cls.client = client(cls.cluster)
        cls.model = cls.client.models.list().data[0].id

    def test_openai_asks_for_base64_unless_told_otherwise(self):
        found = self.client.embeddings.create(model=self.model, input=self.TEXTS)
        vectors = [entry.embedding for entry in found.data]
        self.assertEqual([len(vector) for vector in vectors], [384] * 3)
        self.assertEqual(vectors[0], vectors[2])
        self.assertNotEqual(vectors[0], vectors[1])
        floats = self.client.embeddings.create(model=self.model, input=self.TEXTS[0], encoding_format="float")
        for one, other in zip(floats.data[0].embedding, vectors[0], strict=True):
            self.assertAlmostEqual(one, other, places=6)
        self.assertGreater(found.usage.prompt_tokens, 0)

    def test_litellm_and_langchain(self):
        url = f"{self.cluster.url}/v1"
        lite = litellm.embedding(model=f"openai/{self.model}", api_base=url, api_key=KEY, input=self.TEXTS[:1])
        self.assertEqual(len(lite.data[0]["embedding"]), 384)
        chain = langchain_openai.OpenAIEmbeddings(
            model=self.model, base_url=url, api_key=KEY, check_embedding_ctx_length=False
        )
        self.assertEqual([len(vector) for vector in chain.embed_documents(self.TEXTS)], [384] * 3)


class Limited(unittest.TestCase):
    """One request a second: however slow the machine, those that come together are too many."""

    def test_a_client_that_is_told_to_wait_waits_and_succeeds(self):
        with Cluster(BINARY, "rate_limit_per_second = 1") as cluster, ThreadPoolExecutor(8) as pool:
            patient, hasty = client(cluster, max_retries=20), client(cluster)
            models = list(pool.map(lambda _: patient.models.list().data[0].id, range(4)))
            self.assertEqual(models, [MODEL] * 4)

            def refused(_):
                try:
                    return hasty.models.list() is None
                except openai.RateLimitError:
                    return True

            self.assertIn(True, pool.map(refused, range(16)))


class Killed(unittest.TestCase):
    """The server dies while it streams. What the client has by then must not pass for an answer."""

    def streams(self, url):
        ask = {"prompt": PROMPT, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        yield "openai", lambda: (
            chunk.choices[0].text
            for chunk in openai.OpenAI(base_url=url, api_key=KEY, max_retries=0).completions.create(
                model=MODEL, stream=True, **ask
            )
        )
        yield "openai chat", lambda: (
            chunk.choices[0].delta.content
            for chunk in openai.OpenAI(base_url=url, api_key=KEY, max_retries=0).chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=900,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )
        yield "litellm", lambda: (
            chunk.choices[0].text
            for chunk in litellm.text_completion(
                model=f"text-completion-openai/{MODEL}", api_base=url, api_key=KEY, stream=True, max_retries=0, **ask
            )
        )
        yield "langchain", lambda: langchain_openai.OpenAI(
            model=MODEL, base_url=url, api_key=KEY, max_retries=0, max_tokens=900, extra_body={"ignore_eos": True}
        ).stream(PROMPT)

    def test_half_a_stream_raises(self):
        for name in ("openai", "openai chat", "litellm", "langchain"):
            with self.subTest(name), Cluster(BINARY) as cluster:
                stream = iter(dict(self.streams(f"{cluster.url}/v1"))[name]())
                next(stream)
                cluster.kill()
                with self.assertRaises((openai.APIError, httpx.HTTPError, litellm.exceptions.APIError)) as caught:
                    for _ in stream:
                        pass
                print(f"{name}: {type(caught.exception).__name__}", file=sys.stderr)


class Litellm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster(BINARY))
        cls.options = {
            "model": f"text-completion-openai/{MODEL}",
            "api_base": f"{cls.cluster.url}/v1",
            "api_key": KEY,
            "max_retries": 0,
            "max_tokens": 16,
            "temperature": 0,
        }

    def test_completion_and_stream(self):
        whole = litellm.text_completion(prompt=PROMPT, **self.options)
        self.assertTrue(whole.choices[0].text)
        self.assertGreater(whole.usage.completion_tokens, 0)
        chunks = list(litellm.text_completion(prompt=PROMPT, stream=True, **self.options))
        self.assertEqual("".join(c.choices[0].text or "" for c in chunks if c.choices), whole.choices[0].text)

    def test_errors_are_of_their_class(self):
        with self.assertRaises(litellm.AuthenticationError):
            litellm.text_completion(prompt=PROMPT, **{**self.options, "api_key": "nobody"})
        with self.assertRaises(litellm.NotFoundError):
            litellm.text_completion(prompt=PROMPT, **{**self.options, "model": "text-completion-openai/other"})


class Langchain(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster(BINARY))
        cls.model = langchain_openai.OpenAI(
            model=MODEL, base_url=f"{cls.cluster.url}/v1", api_key=KEY, max_retries=0, max_tokens=16, temperature=0
        )

    def test_completion_and_stream(self):
        whole = self.model.invoke(PROMPT)
        self.assertTrue(whole)
        self.assertEqual("".join(self.model.stream(PROMPT)), whole)


if __name__ == "__main__":
    unittest.main()
