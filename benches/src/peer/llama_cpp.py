"""Measures llama.cpp on request: one line of JSON in, one out. Started by `butterfly bench peer`."""

import ctypes
import json
import sys
import time

import llama_cpp as lib
import numpy

BEFORE = 16


class Engine:
    def __init__(self, path, context, batch):
        lib.llama_backend_init()
        self.quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.quiet, ctypes.c_void_p(0))
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not open {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.length, self.capacity, self.contexts = context, batch, {}
        self.use(1, 1)

    def use(self, sequences, threads):
        """A context for so many sequences, each with room of its own."""
        if sequences not in self.contexts:
            params = lib.llama_context_default_params()
            params.n_ctx = sequences * self.length
            params.n_batch = self.capacity
            params.n_ubatch = 512
            params.n_seq_max = sequences
            context = lib.llama_init_from_model(self.model, params)
            if not context:
                raise SystemExit("llama.cpp makes no context")
            self.contexts[sequences] = context, lib.llama_batch_init(self.capacity, 0, sequences)
        self.context, self.batch = self.contexts[sequences]
        lib.llama_set_n_threads(self.context, threads, threads)

    def clear(self):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def token(self, index):
        return index * 7919 % self.vocabulary

    def decode(self, entries):
        """Entries: token, position, sequence, whether its logits are wanted."""
        self.batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            self.batch.token[index] = token
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = sequence
            self.batch.logits[index] = wanted
        if lib.llama_decode(self.context, self.batch) != 0:
            raise SystemExit("llama_decode failed")
        lib.llama_synchronize(self.context)

    def prefill(self, tokens):
        self.clear()
        entries = [(self.token(index), index, 0, index == tokens - 1) for index in range(tokens)]
        start = time.perf_counter()
        self.decode(entries)
        return tokens / (time.perf_counter() - start)

    def answer(self, sequences, tokens):
        self.clear()
        places = [(sequence, position) for sequence in range(sequences) for position in range(BEFORE)]
        entries = [
            (self.token(index), position, sequence, position == BEFORE - 1)
            for index, (sequence, position) in enumerate(places)
        ]
        self.decode(entries)
        start = time.perf_counter()
        for step in range(tokens):
            self.decode([(self.token(step + sequence), BEFORE + step, sequence, True) for sequence in range(sequences)])
        return tokens * sequences / (time.perf_counter() - start)

    def likelihood(self, tokens):
        """Sum of the natural logarithms of the probabilities of all tokens but the first."""
        self.clear()
        self.decode([(token, position, 0, True) for position, token in enumerate(tokens)])
        total = 0.0
        for position, following in enumerate(tokens[1:]):
            row = lib.llama_get_logits_ith(self.context, position)
            row = numpy.ctypeslib.as_array(row, (self.vocabulary,)).astype(numpy.float64)
            most = row.max()
            total += row[following] - most - numpy.log(numpy.exp(row - most).sum())
        return float(total)

    def encode(self, text):
        vocabulary = lib.llama_model_get_vocab(self.model)
        text = text.encode()
        room = len(text) + 16
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(vocabulary, text, len(text), ids, room, True, True)
        return list(ids[:count])


def main():
    path, context, batch = sys.argv[1], *map(int, sys.argv[2:4])
    engine = Engine(path, context, batch)
    print(json.dumps({"version": lib.__version__}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        engine.use(ask.get("sequences", 1), ask.get("threads", 1))
        what = ask["what"]
        if what == "prefill":
            answer = engine.prefill(ask["tokens"])
        elif what == "decode":
            answer = engine.answer(ask["sequences"], ask["tokens"])
        elif what == "likelihood":
            answer = engine.likelihood(ask["ids"])
        else:
            answer = engine.encode(ask["text"])
        print(json.dumps({"answer": answer}), flush=True)


main()
