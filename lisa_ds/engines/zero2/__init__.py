"""What is asked of DeepSpeed's stock ZeRO-2 optimizer, under which adapters may train; LISA needs ZeRO-3."""
