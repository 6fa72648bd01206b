"""The backend on ONNX Runtime: `backend` keeps the contract, on a CPU or on GPUs."""
