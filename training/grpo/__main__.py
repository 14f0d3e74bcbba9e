"""Run `python -m training.grpo <run folder>`."""

from training.grpo.train import main

if __name__ == "__main__":
    main()
