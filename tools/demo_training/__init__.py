"""How the embedded model is made: everything it learns from is drawn and worded here, nothing is downloaded.

scenes -> what is in a picture, and its pixels · questions -> what is asked, what is right · samples -> training batches
tokenizer, model -> the files of the Qwen2-VL family · cases -> held-out conversations · evaluate -> exact answers
through transformers' own generate.
"""
