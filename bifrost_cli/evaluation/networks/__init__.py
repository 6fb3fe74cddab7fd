"""Networks that metrics use: feature networks, LPIPS, a detector, a VQA judge."""
