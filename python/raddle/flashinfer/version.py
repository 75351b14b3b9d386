"""flashinfer.version: the generation of FlashInfer's API that this module speaks."""

__version__ = "0.7.2.post1"
__git_commit__ = __git_version__ = "raddle"
