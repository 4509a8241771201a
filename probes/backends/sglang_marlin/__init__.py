"""SGLang's Marlin kernels, built from its sources."""
