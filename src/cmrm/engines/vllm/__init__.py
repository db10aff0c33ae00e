"""vLLM: an intervention inside the model's graph, for the requests that carry an image.

`plugin` is what vLLM loads. `program` and `board` need no vLLM: what is done to a batch of tokens,
and the buffers that say to which of them.
"""
