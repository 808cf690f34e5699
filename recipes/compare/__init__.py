"""MMA beside its rivals: LoRA, IA3, LLaMA-Adapter, full fine-tuning and ClipCap as recipes for one `trl sft`."""
