"""Model folders, without torch: what names them by content, their record, their adapters."""
