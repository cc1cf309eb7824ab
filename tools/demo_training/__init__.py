"""How the embedded models are made: everything they learn from is drawn and worded here, nothing is downloaded.

scenes, prints, charts, others -> what can be in a picture · pictures -> facts in, pixels and marks out
phrases, questions, dialogues  -> what is asked, what is right, and where to look for it
labels, views, samples         -> training batches · sight, guide -> what is taught beside the answers
lessons                        -> what one step takes, made by worker processes
tokenizer, model, qwen2_vl, mllama -> the two models and their files, in the published layout of their families
cases, photographs, by_hand    -> held-out conversations · evaluate -> exact answers through transformers' own generate
"""
