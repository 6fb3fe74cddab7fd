"""Sources of captioned images: folders, tables, Parquet, WebDataset archives, data sets of the hub."""
