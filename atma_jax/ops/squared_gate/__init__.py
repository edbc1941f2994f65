"""The MLP's gate, ``g * relu(u)^2``, and its gradients from u and the gate's output."""
