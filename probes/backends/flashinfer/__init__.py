"""FlashInfer's FP4 GEMMs: `mm_fp4` (W4A4) and `mm_bf16_fp4` (W4A16)."""
