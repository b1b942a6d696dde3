"""Checkpoints: reading every published transcoder format, writing our own.

``registry.open_checkpoint`` finds the format from the files and opens it without reading weights;
one module per format (``native``, ``circuit_tracer``, ``peek``, ...). Below them: ``snapshot`` is a
folder or a repository at one commit, ``tensors`` reads safetensors files, ``source`` turns "which
tensor is where" into a ``LayerSource``. ``staging``, ``card`` and ``publish`` write.
"""
