"""How much work a run is, in multiplications: for estimates of time.

Letters: D width, M rows that a token reads, V width of a value.
"""

from memlayers.lm.config import RunConfig

_OF_A_ROW = 8  # an element that is read, summed for its gradient and updated, in multiplications, about


def token_work(config: RunConfig) -> float:
    """Multiplications of the forward pass of a token, and what its rows of values take."""
    model, memory = config.model, config.memory
    dim = model.dim
    attention = 4 * dim * dim + model.context * dim
    rows = memory.heads * memory.topk * memory.width * _OF_A_ROW
    compared = memory.slots if memory.keys == "flat" else memory.num_subkeys  # of each half: a half as wide
    search = memory.heads * memory.query_dim * (dim + compared)
    ffns = model.layers - len(config.memory_layers)
    head = dim * config.data.vocab_size
    return model.layers * attention + ffns * 8 * dim * dim + len(config.memory_layers) * (rows + search) + head


def run_work(config: RunConfig) -> float:
    """Multiplications of a whole run: a training step takes three times its forward pass, an evaluation one."""
    training = config.training
    evaluated = -(-training.steps // training.eval_every_steps) * training.eval_tokens
    return token_work(config) * (3 * training.steps * training.batch_tokens + evaluated)
