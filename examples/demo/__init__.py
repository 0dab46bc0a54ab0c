"""The demo's task, data, tokenizer and report: what `make demo` trains on and how it is judged."""
