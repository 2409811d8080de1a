"""GRPO: the model answers a question several times, and answers better than their group become more probable.

This is reinforcement learning with rewards that can be checked. No one shows the model what to say: a function looks at
an answer and gives a number. The mean reward of a group of answers to one question is the baseline, so no second
network has to guess how good the answers to it usually are. That is group relative policy optimization (arXiv
2402.03300); the defaults are those of its later critics: the advantage is not divided by the standard deviation
(Dr. GRPO, 2503.20783), the loss is a mean over tokens and its clip is higher above than below (DAPO, 2503.14476), and
no reference model holds the model back (--beta 0), so there is no second model.

    python data_process.py rl QUESTIONS.jsonl                    {"prompt", "answer"} -> dataset/rl
    python 5-grpo.py                                             out/sft and dataset/rl -> out/grpo
    python 5-grpo.py --nproc_per_node 2                          the same in two processes
    python 5-grpo.py --reward my_rewards.py:score                a function of your own: score(reply, task) -> number
"""

from base.cli import LESS_MEMORY, above_zero, not_negative, positive, run  # first: handles Ctrl-C while torch loads

# isort: split
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import load_model
from model.lora import apply_lora
from model.model import CausalLM
from training import rollouts
from training.balance import count_each
from training.flags import LORA_FLAGS, fill, parse_flags, run_settings
from training.loop import Run
from training.loss import token_log_probs
from training.machine import start_machine
from training.rollouts import Rollout, RolloutBatch, RolloutGenerator, RolloutSettings


def group_advantages(rewards: Tensor, scale_rewards: bool, worse_weight: float = 1.0) -> Tensor:
    """How much better each answer is than its group, from rewards (groups, answers): 2503.20783, eq. 3.

    scale_rewards: in units of the group's standard deviation, 2402.03300, 4.1.2. worse_weight multiplies advantages
    below 0: with 0 only better answers are learnt from, as in rejection sampling (2504.11343), and rare ones most.
    """
    better = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards:
        better = better / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where(better > 0, better, worse_weight * better)


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of each token, (M,), with rho = p / p_old: 2402.03300,
    eq. 3; 2503.14476, eq. 10. In the first update after generation rho is 1, and its gradient is that of ln p.
    """
    rho = (log_probs - old).exp()
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(rho * advantages, clipped * advantages)


GRPO_FLAGS = {
    "--loss": dict(choices=["dapo", "dr_grpo", "grpo"], default="dapo", help="what the sum is divided by: see select"),
    "--scale_rewards": dict(action="store_true", help="divide by the group's standard deviation"),
    "--worse_weight": dict(type=not_negative, default=1.0, help="of answers worse than their group; 0: leave them out"),
    "--beta": dict(type=not_negative, default=0.0, help="weight of the distance from the model of --init_from"),
    "--updates": dict(type=positive, default=1, help="steps of the optimizer with the same answers"),
    "--clip_low": dict(type=above_zero, default=0.2, help="how much less probable a token may become by them"),
    "--clip_high": dict(type=above_zero, default=0.28, help="how much more"),
}


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS | rollouts.ROLLOUT_FLAGS | GRPO_FLAGS,
        data=Path("dataset/rl"),
        init_from=Path("out/sft"),
        out_dir=Path("out/grpo"),
        epochs=100,
        max_steps=150,
        batch_size=8,  # rows; a row contains several answers
        learning_rate=2e-4,
        warmup_steps=10,
        weight_decay=0.0,
        log_interval=5,
        eval_interval=25,
        lora_rank=0,
    )
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    lengths = args.max_seq_len, args.max_new_tokens
    train_set, val_set = rollouts.open_prompts(args.data, args.mix, *lengths, "rl", reward=args.reward)
    model = load_model(args.init_from)
    reference_dir = args.init_from if args.beta else None
    reference = load_model(reference_dir, machine.device) if reference_dir else None
    if args.lora_rank:
        apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)

    def select(groups: list[list[Rollout]]) -> tuple[list[Rollout], int]:
        """The answers to learn from, with their advantages, and what the sum of their loss is divided by. Without a
        reference an answer as good as its group's mean teaches nothing: it is left out, but its tokens count."""
        answers = [one for group in groups for one in group]
        for group in groups:
            rewards = torch.tensor([[one.reward for one in group]])
            advantages = group_advantages(rewards, args.scale_rewards, args.worse_weight)[0]
            for one, advantage in zip(group, advantages.tolist()):
                one.advantage = advantage
        tokens = sum(sum(one.sequence.chosen) for one in answers)
        count = {"dapo": tokens, "dr_grpo": len(answers) * args.max_new_tokens, "grpo": len(answers)}[args.loss]
        return [one for one in answers if one.advantage or args.beta], count

    def grpo_loss(model: CausalLM, batch: RolloutBatch) -> tuple[Tensor, int, dict[str, Tensor]]:
        scored = batch.scored_positions()  # (M,): of the tokens that the model chose
        old = batch.old_log_probs.flatten()[scored]
        log_probs = token_log_probs(model, batch)
        advantages = batch.advantages.flatten()[scored]
        losses = policy_loss(log_probs, old, advantages, args.clip_low, args.clip_high)
        if reference is not None:  # k3, an estimate of the distance that is never negative: 2402.03300, eq. 4
            with torch.no_grad():
                reference_log_probs = token_log_probs(reference, batch)
            difference = reference_log_probs - log_probs
            losses = losses + args.beta * (difference.exp() - difference - 1)
        if args.loss == "grpo":  # the mean of each answer
            answer = batch.document_index.flatten()[scored]
            losses = losses / count_each(answer, len(batch.documents))[answer]
        gap = (log_probs.detach() - old).abs().sum()  # between the model that generated and the one that learns
        return losses.sum(), batch.scored, {"gap": gap, "scored": batch.scored}

    generator = RolloutGenerator(model, fill(RolloutSettings, args), machine, train_set.tokenizer_dir)
    training = Run(run_settings(args), machine, model, train_set, rollouts.METRICS, reference_dir)
    validate = partial(generator.validate, val_set)
    training.log_start(validate)
    with training:
        for questions in training.steps(args.questions):
            # Generate: several answers to each question, by the model as it is now.
            start, seed = time.perf_counter(), f"{args.seed}/{training.state.step}"
            groups = generator.generate(train_set, questions, args.generations, seed)
            # Score: a reward for each answer.
            generator.score(train_set, groups)
            training.add_sums(**generator.sums_of(groups), sampling_seconds=time.perf_counter() - start)
            # Select: those that are better or worse than their group.
            answers, count = select(groups)
            # Learn.
            for _ in range(args.updates):
                batches = rollouts.learning_batches(answers, args.max_seq_len, training.batch_size)
                training.forward_backward(grpo_loss, batches, count)
                training.update()
            if training.log_step(validate, rollouts.rollout_metrics):
                generator.save_samples(training.log.directory, training.state.step, groups, train_set)


if __name__ == "__main__":
    run(main, less_memory=f"{LESS_MEMORY}; a lower --rollout_rows takes less while it generates")
