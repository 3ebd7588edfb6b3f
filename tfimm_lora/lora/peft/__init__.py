"""PEFT's adapter files: reading them by PEFT's rules, and writing files that PEFT reads."""
