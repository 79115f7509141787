"""What the export puts into a model repository of Triton Inference Server: `model.py` of models in Python.

`triton_python_backend_utils` exists inside the server alone, so nothing here is imported by the rest.
"""
