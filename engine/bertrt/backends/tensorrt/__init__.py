"""The backend on TensorRT: `backend` keeps the contract with plans, `library` knows which TensorRT there is."""
