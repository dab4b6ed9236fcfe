"""AdaLoRA's ranks while it trains: PEFT leaves it to the training loop to ask for them."""

from typing import Any

from transformers import TrainerCallback

_WARM, _FINAL = 0.1, 0.3  # shares of all steps: at the full rank first, and without changes of rank at the end


class RankAllocation(TrainerCallback):
    """Tells AdaLoRA how many steps there are, and lets it choose its ranks after each of them.

    A schedule that the recipe's options set (`tinit`, `tfinal`) is kept; else the ranks shrink between a tenth and seven
    tenths of the steps.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the schedule."""
        allocator = kwargs["model"].base_model.rankallocator
        config = allocator.peft_config
        if not config.tinit and not config.tfinal:
            config.tinit, config.tfinal = int(_WARM * state.max_steps), int(_FINAL * state.max_steps)
        allocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the importance of directions; the gradients that it needs are still there."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)
