"""fp4tune: finds, proves and remembers the fastest safe FP4 GEMM backend of this GPU."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["__version__", "report_fault", "watch"]


def __getattr__(name: str) -> object:
    # On demand, so that importing fp4tune imports nothing.
    if name == "report_fault":
        from .cache.reader import report_fault

        return report_fault
    if name == "watch":
        # Loaded and not imported: every room may ask for the version, and few may for a witness.
        return import_module(".witness.linear", __name__).watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
