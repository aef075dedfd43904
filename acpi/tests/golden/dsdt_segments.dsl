DefinitionBlock ("", "DSDT", 2, "DORMSE", "DORMOUSE", 0x00000001)
{
    Scope (\_SB)
    {
        Device (MBRD)
        {
            Name (_HID, EisaId ("PNP0C02") /* PNP Motherboard Resources */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                Memory32Fixed (ReadWrite,
                    0xE0000000,         // Address Base
                    0x10000000,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xE0200000,         // Address Base
                    0x00200000,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED10000,         // Address Base
                    0x00001000,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED20000,         // Address Base
                    0x00000018,         // Address Length
                    )
                Memory32Fixed (ReadWrite,
                    0xFED30000,         // Address Base
                    0x00000001,         // Address Length
                    )
                IO (Decode16,
                    0x0600,             // Range Minimum
                    0x0600,             // Range Maximum
                    0x01,               // Alignment
                    0x04,               // Length
                    )
                IO (Decode16,
                    0x0604,             // Range Minimum
                    0x0604,             // Range Maximum
                    0x01,               // Alignment
                    0x02,               // Length
                    )
            })
        }

        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08") /* PCI Express Bus */)  // _HID: Hardware ID
            Name (_CID, EisaId ("PNP0A03") /* PCI Bus */)  // _CID: Compatible ID
            Name (_SEG, Zero)  // _SEG: PCI Segment
            Name (_BBN, Zero)  // _BBN: BIOS Bus Number
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CBA, 0xE0000000)  // _CBA: Configuration Base Address
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0x0000,             // Granularity
                    0x0000,             // Range Minimum
                    0x00FF,             // Range Maximum
                    0x0000,             // Translation Offset
                    0x0100,             // Length
                    ,, )
                IO (Decode16,
                    0x0CF8,             // Range Minimum
                    0x0CF8,             // Range Maximum
                    0x01,               // Alignment
                    0x08,               // Length
                    )
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
                    0x0000,             // Granularity
                    0x1000,             // Range Minimum
                    0xFFFF,             // Range Maximum
                    0x0000,             // Translation Offset
                    0xF000,             // Length
                    ,, , TypeStatic, DenseTranslation)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x00000000,         // Granularity
                    0xC0000000,         // Range Minimum
                    0xDFFFFFFF,         // Range Maximum
                    0x00000000,         // Translation Offset
                    0x20000000,         // Length
                    ,, , AddressRangeMemory, TypeStatic)
                QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x0000000000000000, // Granularity
                    0x0000008000000000, // Range Minimum
                    0x000000EFFFFFFFFF, // Range Maximum
                    0x0000000000000000, // Translation Offset
                    0x0000007000000000, // Length
                    ,, , AddressRangeMemory, TypeStatic)
            })
            Method (_OSC, 4, Serialized)  // _OSC: Operating System Capabilities
            {
                CreateDWordField (Arg3, Zero, CDW1)
                If ((Arg0 == ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766") /* PCI Host Bridge Device */))
                {
                    If ((Arg1 != One))
                    {
                        CDW1 |= 0x08
                    }

                    If ((Arg2 >= 0x03))
                    {
                        CreateDWordField (Arg3, 0x08, CDW3)
                        Local0 = (CDW3 & 0x15)
                        If ((Local0 != CDW3))
                        {
                            CDW1 |= 0x10
                        }

                        CDW3 = Local0
                    }
                }
                Else
                {
                    CDW1 |= 0x04
                }

                Return (Arg3)
            }

            Name (_PRT, Package (0x04)  // _PRT: PCI Routing Table
            {
                Package (0x04)
                {
                    0x0001FFFF, 
                    Zero, 
                    Zero, 
                    0x11
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    One, 
                    Zero, 
                    0x12
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    0x02, 
                    Zero, 
                    0x13
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    0x03, 
                    Zero, 
                    0x14
                }
            })
            Method (PDSM, 3, NotSerialized)
            {
                If ((Arg0 == ToUUID ("e5c937d0-3553-4d7a-9117-ea4d19c3434d") /* Device Labeling Interface */))
                {
                    If ((Arg2 == Zero))
                    {
                        Return (Buffer (0x02)
                        {
                             0x01, 0x02                                       // ..
                        })
                    }

                    If ((Arg2 == 0x09))
                    {
                        If ((Arg1 >= 0x03))
                        {
                            Return (Package (0x05)
                            {
                                Zero, 
                                Zero, 
                                Zero, 
                                Zero, 
                                Zero
                            })
                        }
                    }
                }

                Return (Buffer (One)
                {
                     0x00                                             // .
                })
            }

            Device (S08)
            {
                Name (_ADR, 0x00010000)  // _ADR: Address
                PowerResource (PWRR, 0x00, 0x0000)
                {
                    OperationRegion (REGS, SystemMemory, 0xFED10100, 0x08)
                    Field (REGS, DWordAcc, NoLock, WriteAsZeros)
                    {
                        REQU,   32, 
                        STAT,   32
                    }

                    Method (_STA, 0, Serialized)  // _STA: Status
                    {
                        Return ((STAT & One))
                    }

                    Method (_ON, 0, Serialized)  // _ON_: Power On
                    {
                        REQU = One
                        Local0 = (Timer + 0x07270E00)
                        While ((STAT & 0x02))
                        {
                            If ((Timer > Local0))
                            {
                                Break
                            }

                            Sleep (One)
                        }
                    }

                    Method (_OFF, 0, Serialized)  // _OFF: Power Off
                    {
                        REQU = Zero
                    }
                }

                Name (_PR0, Package (0x01)  // _PR0: Power Resources for D0
                {
                    PWRR
                })
                Name (_PR2, Package (0x01)  // _PR2: Power Resources for D2
                {
                    PWRR
                })
                Name (_PR3, Package (0x01)  // _PR3: Power Resources for D3hot
                {
                    PWRR
                })
                Name (_S0W, 0x04)  // _S0W: S0 Device Wake State
                Method (_DSM, 4, NotSerialized)  // _DSM: Device-Specific Method
                {
                    Return (\_SB.PCI0.PDSM (Arg0, Arg1, Arg2))
                }

                Device (S00)
                {
                    Name (_ADR, Zero)  // _ADR: Address
                    PowerResource (PWRR, 0x00, 0x0000)
                    {
                        OperationRegion (REGS, SystemMemory, 0xFED10108, 0x08)
                        Field (REGS, DWordAcc, NoLock, WriteAsZeros)
                        {
                            REQU,   32, 
                            STAT,   32
                        }

                        Method (_STA, 0, Serialized)  // _STA: Status
                        {
                            Return ((STAT & One))
                        }

                        Method (_ON, 0, Serialized)  // _ON_: Power On
                        {
                            REQU = One
                            Local0 = (Timer + 0x07270E00)
                            While ((STAT & 0x02))
                            {
                                If ((Timer > Local0))
                                {
                                    Break
                                }

                                Sleep (One)
                            }
                        }

                        Method (_OFF, 0, Serialized)  // _OFF: Power Off
                        {
                            REQU = Zero
                        }
                    }

                    Name (_PR0, Package (0x01)  // _PR0: Power Resources for D0
                    {
                        PWRR
                    })
                    Name (_PR2, Package (0x01)  // _PR2: Power Resources for D2
                    {
                        PWRR
                    })
                    Name (_PR3, Package (0x01)  // _PR3: Power Resources for D3hot
                    {
                        PWRR
                    })
                    Name (_S0W, 0x04)  // _S0W: S0 Device Wake State
                    Method (_DSM, 4, NotSerialized)  // _DSM: Device-Specific Method
                    {
                        Return (\_SB.PCI0.PDSM (Arg0, Arg1, Arg2))
                    }
                }
            }
        }

        Device (PCI1)
        {
            Name (_HID, EisaId ("PNP0A08") /* PCI Express Bus */)  // _HID: Hardware ID
            Name (_CID, EisaId ("PNP0A03") /* PCI Bus */)  // _CID: Compatible ID
            Name (_SEG, One)  // _SEG: PCI Segment
            Name (_BBN, Zero)  // _BBN: BIOS Bus Number
            Name (_UID, One)  // _UID: Unique ID
            Name (_CBA, 0xE0200000)  // _CBA: Configuration Base Address
            Name (_PXM, One)  // _PXM: Device Proximity
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0x0000,             // Granularity
                    0x0000,             // Range Minimum
                    0x0001,             // Range Maximum
                    0x0000,             // Translation Offset
                    0x0002,             // Length
                    ,, )
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x00000000,         // Granularity
                    0xC0100000,         // Range Minimum
                    0xC01FFFFF,         // Range Maximum
                    0x00000000,         // Translation Offset
                    0x00100000,         // Length
                    ,, , AddressRangeMemory, TypeStatic)
                QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x0000000000000000, // Granularity
                    0x0000008040000000, // Range Minimum
                    0x000000807FFFFFFF, // Range Maximum
                    0x0000000000000000, // Translation Offset
                    0x0000000040000000, // Length
                    ,, , AddressRangeMemory, TypeStatic)
            })
            Method (_OSC, 4, Serialized)  // _OSC: Operating System Capabilities
            {
                CreateDWordField (Arg3, Zero, CDW1)
                If ((Arg0 == ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766") /* PCI Host Bridge Device */))
                {
                    If ((Arg1 != One))
                    {
                        CDW1 |= 0x08
                    }

                    If ((Arg2 >= 0x03))
                    {
                        CreateDWordField (Arg3, 0x08, CDW3)
                        Local0 = (CDW3 & 0x15)
                        If ((Local0 != CDW3))
                        {
                            CDW1 |= 0x10
                        }

                        CDW3 = Local0
                    }
                }
                Else
                {
                    CDW1 |= 0x04
                }

                Return (Arg3)
            }

            Name (_PRT, Package (0x08)  // _PRT: PCI Routing Table
            {
                Package (0x04)
                {
                    0x0001FFFF, 
                    Zero, 
                    Zero, 
                    0x11
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    One, 
                    Zero, 
                    0x12
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    0x02, 
                    Zero, 
                    0x13
                }, 

                Package (0x04)
                {
                    0x0001FFFF, 
                    0x03, 
                    Zero, 
                    0x14
                }, 

                Package (0x04)
                {
                    0x0002FFFF, 
                    Zero, 
                    Zero, 
                    0x12
                }, 

                Package (0x04)
                {
                    0x0002FFFF, 
                    One, 
                    Zero, 
                    0x13
                }, 

                Package (0x04)
                {
                    0x0002FFFF, 
                    0x02, 
                    Zero, 
                    0x14
                }, 

                Package (0x04)
                {
                    0x0002FFFF, 
                    0x03, 
                    Zero, 
                    0x15
                }
            })
            Device (S10)
            {
                Name (_ADR, 0x00020000)  // _ADR: Address
                PowerResource (PWRR, 0x00, 0x0000)
                {
                    OperationRegion (REGS, SystemMemory, 0xFED10310, 0x08)
                    Field (REGS, DWordAcc, NoLock, WriteAsZeros)
                    {
                        REQU,   32, 
                        STAT,   32
                    }

                    Method (_STA, 0, Serialized)  // _STA: Status
                    {
                        Return ((STAT & One))
                    }

                    Method (_ON, 0, Serialized)  // _ON_: Power On
                    {
                        REQU = One
                        Local0 = (Timer + 0x07270E00)
                        While ((STAT & 0x02))
                        {
                            If ((Timer > Local0))
                            {
                                Break
                            }

                            Sleep (One)
                        }
                    }

                    Method (_OFF, 0, Serialized)  // _OFF: Power Off
                    {
                        REQU = Zero
                    }
                }

                Name (_PR0, Package (0x01)  // _PR0: Power Resources for D0
                {
                    PWRR
                })
                Name (_PR2, Package (0x01)  // _PR2: Power Resources for D2
                {
                    PWRR
                })
                Name (_PR3, Package (0x01)  // _PR3: Power Resources for D3hot
                {
                    PWRR
                })
                Name (_S0W, 0x04)  // _S0W: S0 Device Wake State
                Method (_DSM, 4, NotSerialized)  // _DSM: Device-Specific Method
                {
                    Return (\_SB.PCI0.PDSM (Arg0, Arg1, Arg2))
                }

                Name (_SUN, 0x22)  // _SUN: Slot User Number
                Name (_RMV, One)  // _RMV: Removal Status
                Method (_OST, 3, Serialized)  // _OST: OSPM Status Indication
                {
                    \_SB.GED.RLSE (0x00010002, Arg0, Arg1)
                }
            }

            Device (S08)
            {
                Name (_ADR, 0x00010000)  // _ADR: Address
                PowerResource (PWRR, 0x00, 0x0000)
                {
                    OperationRegion (REGS, SystemMemory, 0xFED10300, 0x08)
                    Field (REGS, DWordAcc, NoLock, WriteAsZeros)
                    {
                        REQU,   32, 
                        STAT,   32
                    }

                    Method (_STA, 0, Serialized)  // _STA: Status
                    {
                        Return ((STAT & One))
                    }

                    Method (_ON, 0, Serialized)  // _ON_: Power On
                    {
                        REQU = One
                        Local0 = (Timer + 0x07270E00)
                        While ((STAT & 0x02))
                        {
                            If ((Timer > Local0))
                            {
                                Break
                            }

                            Sleep (One)
                        }
                    }

                    Method (_OFF, 0, Serialized)  // _OFF: Power Off
                    {
                        REQU = Zero
                    }
                }

                Name (_PR0, Package (0x01)  // _PR0: Power Resources for D0
                {
                    PWRR
                })
                Name (_PR2, Package (0x01)  // _PR2: Power Resources for D2
                {
                    PWRR
                })
                Name (_PR3, Package (0x01)  // _PR3: Power Resources for D3hot
                {
                    PWRR
                })
                Name (_S0W, 0x04)  // _S0W: S0 Device Wake State
                Method (_DSM, 4, NotSerialized)  // _DSM: Device-Specific Method
                {
                    Return (\_SB.PCI0.PDSM (Arg0, Arg1, Arg2))
                }

                Device (S00)
                {
                    Name (_ADR, Zero)  // _ADR: Address
                    PowerResource (PWRR, 0x00, 0x0000)
                    {
                        OperationRegion (REGS, SystemMemory, 0xFED10308, 0x08)
                        Field (REGS, DWordAcc, NoLock, WriteAsZeros)
                        {
                            REQU,   32, 
                            STAT,   32
                        }

                        Method (_STA, 0, Serialized)  // _STA: Status
                        {
                            Return ((STAT & One))
                        }

                        Method (_ON, 0, Serialized)  // _ON_: Power On
                        {
                            REQU = One
                            Local0 = (Timer + 0x07270E00)
                            While ((STAT & 0x02))
                            {
                                If ((Timer > Local0))
                                {
                                    Break
                                }

                                Sleep (One)
                            }
                        }

                        Method (_OFF, 0, Serialized)  // _OFF: Power Off
                        {
                            REQU = Zero
                        }
                    }

                    Name (_PR0, Package (0x01)  // _PR0: Power Resources for D0
                    {
                        PWRR
                    })
                    Name (_PR2, Package (0x01)  // _PR2: Power Resources for D2
                    {
                        PWRR
                    })
                    Name (_PR3, Package (0x01)  // _PR3: Power Resources for D3hot
                    {
                        PWRR
                    })
                    Name (_S0W, 0x04)  // _S0W: S0 Device Wake State
                    Method (_DSM, 4, NotSerialized)  // _DSM: Device-Specific Method
                    {
                        Return (\_SB.PCI0.PDSM (Arg0, Arg1, Arg2))
                    }
                }
            }
        }

        Device (PWRB)
        {
            Name (_HID, EisaId ("PNP0C0C") /* Power Button Device */)  // _HID: Hardware ID
        }

        Device (GED)
        {
            Name (_HID, "ACPI0013" /* Generic Event Device */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x0000000A,
                }
            })
            OperationRegion (EREG, SystemMemory, 0xFED20000, 0x18)
            Field (EREG, DWordAcc, NoLock, WriteAsZeros)
            {
                EVTS,   32, 
                ADDD,   32, 
                LEAV,   32, 
                RLSD,   32, 
                A001,   32, 
                L001,   32
            }

            OperationRegion (WREG, SystemMemory, 0xFED10010, 0x20)
            Field (WREG, DWordAcc, NoLock, WriteAsZeros)
            {
                WAK0,   32, 
                WAK1,   32, 
                WAK2,   32, 
                WAK3,   32, 
                WAK4,   32, 
                WAK5,   32, 
                WAK6,   32, 
                WAK7,   32
            }

            Method (RLSE, 3, Serialized)
            {
                If ((Arg1 == 0x03))
                {
                    Local0 = ((Arg2 & 0xFF) << 0x08)
                    RLSD = (Local0 | Arg0)
                }
            }

            Method (_EVT, 1, Serialized)  // _EVT: Event
            {
                Local0 = EVTS /* \_SB_.GED_.EVTS */
                If ((Local0 & One))
                {
                    Notify (\_SB.PWRB, 0x80) // Status Change
                }

                If ((Local0 & 0x02))
                {
                    Local1 = WAK0 /* \_SB_.GED_.WAK0 */
                    If ((Local1 & 0x02))
                    {
                        Notify (\_SB.PCI0.S08.S00, 0x02) // Device Wake
                    }

                    Local1 = WAK2 /* \_SB_.GED_.WAK2 */
                    If ((Local1 & 0x02))
                    {
                        Notify (\_SB.PCI1.S08.S00, 0x02) // Device Wake
                    }

                    If ((Local1 & 0x04))
                    {
                        Notify (\_SB.PCI1.S10, 0x02) // Device Wake
                    }
                }

                If ((Local0 & 0x04))
                {
                    Local1 = A001 /* \_SB_.GED_.A001 */
                    If ((Local1 & 0x04))
                    {
                        Notify (\_SB.PCI1.S10, One) // Device Check
                    }

                    Local1 = L001 /* \_SB_.GED_.L001 */
                    If ((Local1 & 0x04))
                    {
                        Notify (\_SB.PCI1.S10, 0x03) // Eject Request
                    }
                }
            }
        }

        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501") /* 16550A-compatible COM Serial Port */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                IO (Decode16,
                    0x03F8,             // Range Minimum
                    0x03F8,             // Range Maximum
                    0x01,               // Alignment
                    0x08,               // Length
                    )
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x00000004,
                }
            })
        }

        Device (RTC)
        {
            Name (_HID, EisaId ("PNP0B00") /* AT Real-Time Clock */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
            Name (_CRS, ResourceTemplate ()  // _CRS: Current Resource Settings
            {
                IO (Decode16,
                    0x0070,             // Range Minimum
                    0x0070,             // Range Maximum
                    0x01,               // Alignment
                    0x02,               // Length
                    )
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )
                {
                    0x00000008,
                }
            })
        }

        Device (C000)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, Zero)  // _UID: Unique ID
        }

        Device (C001)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, One)  // _UID: Unique ID
        }

        Device (C002)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, 0x02)  // _UID: Unique ID
        }

        Device (C003)
        {
            Name (_HID, "ACPI0007" /* Processor Device */)  // _HID: Hardware ID
            Name (_UID, 0x03)  // _UID: Unique ID
        }
    }

    Name (\_S5, Package (0x04)  // _S5_: S5 System State
    {
        0x05, 
        0x05, 
        Zero, 
        Zero
    })
}
