# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[math]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Teaches a language model to use a second attempt, with one advantage for each attempt. A second attempt is compared with
others after a first one of the same outcome. Ends with a table from before and after.

The tiny world, a few minutes on two CPU cores:

    python examples/blockwise_two_attempts.py
    python examples/blockwise_two_attempts.py --method grpo

`--method` is as in blockwise_grpo.py; `grpo` and `rlcr` both are TRL's GRPO with the sum of both attempts' rewards.
"""

from blockwise_grpo import TaskArguments, finish, load_problems, make_trainer, parse, sample

from flow_trl.evaluation import score_two_attempts
from flow_trl.tasks import CORRECT, two_attempt_task


def main() -> None:
    arguments, args = parse(TaskArguments, "blockwise_two_attempts", max_completion_length=72)
    correct = CORRECT["exact" if arguments.model_name_or_path is None else "math"]
    task = two_attempt_task(correct=correct)
    train_dataset, eval_dataset = load_problems(arguments, task, "arithmetic_two_attempts")
    trainer, tokenizer = make_trainer(arguments, args, task, task.scalar_reward_funcs, train_dataset)

    def evaluate() -> dict[str, float]:
        completions = sample(trainer, tokenizer, eval_dataset, arguments)
        return score_two_attempts(completions, eval_dataset["answer"][:], correct=correct)

    results = {"before": evaluate()}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    results["after"] = evaluate()

    measures = {"first_accuracy": "first", "second_accuracy": "second", "changed": "changed"}
    measures |= {"wrong_to_right": "wrong to right", "right_to_wrong": "right to wrong", "format": "format"}
    finish(trainer, results, measures)


if __name__ == "__main__":
    main()
