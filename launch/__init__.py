"""TorchX components: how a run reaches a scheduler. Imports torchx only, so that a submit host needs no torch."""
