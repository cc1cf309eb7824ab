"""LightVL: a server for vision-language models in one asyncio process.

Packages, each importing only from those before it:
core, errors, config, log, metrics <- images <- scheduling | attention <- models <- prompt <- engine <- server <- cli
"""

__version__ = "0.1.0"
