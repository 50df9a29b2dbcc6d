"""What several tests build on: tiny checkpoints, adapters and architectures, and a project that takes no time."""
