"""raddle inside other frameworks. Each module imports its framework, so import the one you need:

raddle.integrations.transformers   attention implementations "raddle" and "paged|raddle"
raddle.integrations.torch          operators for torch.compile and CUDA graphs
"""
