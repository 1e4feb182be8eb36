"""Does the model call the memory, and does its loss depend on what comes out?"""

from memlayers.diagnosis.findings import Answer, fails, passed
from memlayers.diagnosis.watch import Watch


def reached(watch: Watch) -> Answer:
    if not watch.calls and not watch.subject.is_active:
        return fails("the memory is not active", "choose it by memlayers.models.set_active(model, names)")
    if not watch.calls:
        return fails(
            "the memory was bypassed: the model never called it",
            "see that the block calls the module under which the memory stands",
        )
    calls = f"{watch.calls} call{'s' * (watch.calls != 1)}, {watch.tokens:,} tokens"
    if not watch.can_have_gradient:
        return fails(
            f"{calls}, but outside of any gradient (torch.no_grad, or everything before and in it is frozen)",
            "let the memory's parameters require gradients, and call it where gradients are recorded",
        )
    if not watch.has_gradient:
        return fails(
            f"{calls}, but its output is dropped: the loss does not depend on it (its gradient is zero)",
            "see that the block adds the memory's output to what it returns, and detaches nothing on the way",
        )
    gate = "; its gate is still zero, and was opened for this check" if watch.gate_was_zero else ""
    return passed(f"{calls}; the loss depends on its output{gate}")
