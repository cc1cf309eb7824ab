"""Messages in, `Prompt` out, and tokens back to text. Knows HTTP and the engine not at all.

template (builtin_templates, jinja_template): messages -> segments: control strings, client text, image slots
choice:                                       which template a server uses, and why
tokenizer (vocabulary):                       segments -> token ids; client text never becomes a control token
media:                                        image parts -> `Media`: bytes, layout, identity; pixels when asked for
structured:                                   JSON schemas and other grammars -> masks over the next token
build:                                        all of it together -> `Prompt`, with the radix cache's key
detokenizer:                                  sampled ids -> text as it becomes sure, held back before stop strings
"""
