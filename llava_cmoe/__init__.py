"""Continual instruction tuning of vision-language LLMs with LoRA experts (LLaVA-CMoE)."""
